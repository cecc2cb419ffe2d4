"""What of linear algebra only the host can do: raise errors, and factorizations that XLA does not have."""

import numpy as np
import torch
from torchax.ops import aten, lowering


def _on_host(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def _back(results):
    return tuple(r.numpy() for r in results)  # whose strides are kept


@lowering(aten._linalg_check_errors.default, kind="dynamic")
def linalg_check_errors(info, api_name, *, is_matrix):
    """Raise torch's own error if an `info` is not 0."""
    aten._linalg_check_errors.default(_on_host(info), api_name, is_matrix=is_matrix)


@lowering(aten.linalg_ldl_factor_ex.default, kind="dynamic")
def linalg_ldl_factor_ex(self, *, hermitian=False, check_errors=False):
    """Symmetric indefinite factorization, by LAPACK."""
    return _back(aten.linalg_ldl_factor_ex.default(_on_host(self), hermitian=hermitian, check_errors=check_errors))


@lowering(aten.linalg_ldl_solve.default, kind="dynamic")
def linalg_ldl_solve(LD, pivots, B, *, hermitian=False):
    """Solve with the factors of `linalg_ldl_factor_ex`, by LAPACK."""
    return _back([aten.linalg_ldl_solve.default(_on_host(LD), _on_host(pivots), _on_host(B), hermitian=hermitian)])[0]
