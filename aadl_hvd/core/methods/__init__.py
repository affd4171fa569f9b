"""Methods: what turns the history of an iteration into a proposed point.

Each is a class here, and one plain function in `reference`. `handover` says which is at work.
"""
