"""Set-up and cluster launch; run from the checkout: ``python -m launch --help``."""
