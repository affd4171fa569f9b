"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Wrong input: an option, a path, a data set, a checkpoint.

    The programs print its message alone, without a traceback, and exit with code 2. It may only be
    raised where every rank raises it, or inside `models.dist.on_rank0` and
    `models.dist.fail_together`, which see to that: a rank that leaves alone leaves the others
    waiting.
    """
