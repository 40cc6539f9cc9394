"""Log-probabilities as 16-bit numbers, with one bound of the error for all of them.

Equal steps in the logarithm are equal relative errors of a probability, for likely and unlikely ids alike. Half the
step would cost a bit an id, 8 bytes a token at K = 64.
"""

import numpy as np
from numpy.typing import NDArray

STEP = 1 / 128  # nats; a power of two, so that rounding to it is exact in float32
BOUND = STEP / 2  # of the error of a log-probability that is not lower than LOWEST
NOTHING = 2**16 - 1  # the code of -inf
LOWEST = -(NOTHING - 1) * STEP  # -512 nats. Lower ones become -inf: float32 has no probability below e^-104


def codes(log_probs: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The code of each log-probability: how many steps it is below 0, or NOTHING."""
    steps = np.rint(log_probs.astype(np.float64) / -STEP)
    return np.clip(steps, 0, NOTHING).astype(np.uint16)


def log_probs(codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    values = np.float32(0) - codes.astype(np.float32) * np.float32(STEP)  # 0 and not -0
    return np.where(codes == NOTHING, np.float32(-np.inf), values)


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return log_probs(codes(values))
