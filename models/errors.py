"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Wrong input: an option, a path, a data set, a checkpoint.

    The programs print its message alone, without a traceback, and exit with code 2. Every rank must
    raise it, or the others wait for the rank that left. `models.dist.on_rank0` and
    `models.dist.fail_together` raise it on all ranks.
    """
