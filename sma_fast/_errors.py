"""The exceptions that more than one module raises or catches."""


class Unavailable(Exception):
    """Why a backend, or one op of it, cannot answer here."""


NO_CUDA_DEVICE = (
    "no CUDA device that torch can use: torch.cuda.init() says why (a CPU build of torch, a driver "
    "too old, no GPU)"
)
