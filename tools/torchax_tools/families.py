"""The family of an operator that has no lowering of its own: told from its name."""

from __future__ import annotations

import re

# the first that is found in the name without leading underscores
_PATTERNS = (
    ("foreach", r"^(foreach|amp_foreach|fused_(adam|sgd|adagrad|adamw))"),
    ("sparse", r"sparse|coalesce|coo|csr|csc|bsr|bsc|^(indices|values|crow|ccol|row|col)_|^dim[IV]$|^nnz|^(indices|values)$"),
    ("nested", r"nested|jagged"),
    ("quantized", r"quant|qparams|int4|int8|int_repr|fbgemm|qscheme|^q_|^choose_qparams"),
    ("vendor", r"cudnn|miopen|mkldnn|mps|xnnpack|cslt|metal|vulkan|nnpack|cufft"),
    ("attention", r"attention|sdp_choice|dropout_mask"),
    ("fft", r"^fft|fftw|stft"),
    ("linalg", r"^linalg|cholesky|^lu|lstsq|pinverse|^svd|qr$|geqrf|ormqr|orgqr|matrix_|_det|logdet|inverse|eig|triangular_solve"),
    ("special", r"^special|bessel|chebyshev|hermite|laguerre|legendre"),
    ("rnn", r"lstm|gru|rnn|thnn|pack_padded|pad_packed"),
    ("upsample", r"upsample|interpolate|grid_sampler|affine_grid"),
    ("conv", r"conv|slow_conv|unfold2d|im2col|col2im"),
    ("pool", r"pool"),
    ("norm", r"norm|batch_stats"),
    ("embedding", r"embedding"),
    ("loss", r"loss|cross_entropy|kl_div"),
    ("random", r"rand|bernoulli|multinomial|dropout|uniform|normal|exponential|cauchy|geometric|poisson|dirichlet|gamma$"),
    ("pad", r"pad"),
    ("matmul", r"mm$|matmul|bmm|mv$|dot|addr|einsum|linear|scaled_mm|grouped_mm|tensordot|kron|^chain"),
    ("indexing", r"index|gather|scatter|take|masked|put|select|nonzero|where"),
    ("sort", r"sort|topk|kthvalue|unique|search|bucketize|median|mode|histogram|histc"),
    ("reductions", r"^(sum|mean|prod|std|var|any|all|amax|amin|max|min|argm|logsumexp|count_nonzero|trace|cum|logcum)"),
    ("views", r"_copy$|^(view|reshape|expand|squeeze|unsqueeze|transpose|permute|split|chunk|slice|narrow|diagonal|unbind|flatten|swap|mov|as_strided|detach|alias|t$|[hmH]T$|adjoint|unflatten|unsafe|hsplit|vsplit|dsplit|tensor_split)"),
    ("factories", r"^(arange|empty|zeros|ones|full|eye|linspace|logspace|tril|triu|new_|scalar_tensor|range|from_file|complex$|polar|hann|hamming|blackman|kaiser|bartlett)"),
    ("shape", r"^(cat|concat|stack|hstack|vstack|dstack|column_stack|row_stack|flip|roll|rot90|repeat|tile|meshgrid|block_diag|cartesian|combinations|atleast|fill|copy|set|resize|clone|contiguous|to$|type_as|cdist|pdist)"),
    ("activation", r"relu|elu|gelu|silu|mish|sigmoid|softmax|softplus|softshrink|hardshrink|hardtanh|hardswish|glu|tanhshrink|threshold"),
    ("logic", r"^(bitwise|logical|eq|ne|lt|le|gt|ge|less|greater|not_equal|isclose|isnan|isinf|isreal|isfinite|isin|is|and|or|xor|lshift|rshift|equal|allclose)"),
)  # fmt: skip


def family_of(op: str) -> str:
    """The family that the name of an operator suggests; ``other`` if it suggests none."""
    packet = op.split("::")[-1].split(".")[0].strip("_")
    return next((family for family, pattern in _PATTERNS if re.search(pattern, packet)), "other")
