"""Whether an error says that there is not enough memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, a CPU or an accelerator had no more memory to give."""
    # On a CPU torch says so in words only: that it can't, or cannot.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
