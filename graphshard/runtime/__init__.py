"""Executors: what runs an execution plan. ``local``: every rank in one process; ``distributed``: one rank of many."""
