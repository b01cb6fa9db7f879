"""What a peer raises where it cannot be compared."""


class PeerUnavailableError(RuntimeError):
    """A peer does not run here, or cannot do what is asked; the text says why."""
