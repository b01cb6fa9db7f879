"""What a peer raises if it cannot be compared."""


class PeerUnavailableError(RuntimeError):
    """A peer does not run here, or does not solve this problem; the message says why."""
