"""The exceptions that torchax raises itself. torch's own errors (shapes, dtypes, devices) come as torch words them."""


class TorchaxError(Exception):
    """Base of every exception that torchax defines."""


class OperatorNotFound(TorchaxError, NotImplementedError):
    """No plugin lowers the op, torch cannot decompose it, and the CPU fallback is off."""


class DataDependentShape(TorchaxError, RuntimeError):
    """The shape of an op's result depends on values, which are not known while a function is traced."""


class TracerEscaped(TorchaxError, RuntimeError):
    """A value that is known only while a function is traced was asked for outside of it, or as a number."""


class Retraced(TorchaxError, RuntimeError):
    """A compiled function needs another recording, and was told to refuse that (``on_retrace="error"``)."""


class BufferDonated(TorchaxError, RuntimeError):
    """A tensor is read whose buffer a compiled function has overwritten (it was written there, under another name)."""


class UnsupportedDtype(TorchaxError, TypeError):
    """JAX and torch have no common type for the values."""


class UnsupportedLayout(TorchaxError, TypeError):
    """The tensor is not dense (sparse, jagged, mkldnn): JAX arrays are."""


class PluginError(TorchaxError, RuntimeError):
    """A plugin breaks the contract: a tie between two lowerings, a bad registration, another API major."""


class InvalidOperands(TorchaxError, RuntimeError):
    """A lowering refuses operands that CPU torch refuses, and that torch's own metadata check lets pass."""


class LoweringError(TorchaxError, RuntimeError):
    """A lowering failed inside JAX or disagrees with the op's metadata; names op, provider and the user's line."""


class NaNFound(TorchaxError, FloatingPointError):
    """`config.nan_check` saw an op turn finite inputs into NaN."""


class PlatformUnavailable(TorchaxError, RuntimeError):
    """The JAX platform or device that was asked for does not exist here."""


class CheckpointError(TorchaxError, RuntimeError):
    """A checkpoint is missing, damaged or does not fit the target."""
