"""Pass tests written as graph text, tests/cases/<pass>/<what>.graph, are collected by the kit's plugin."""

from __future__ import annotations

pytest_plugins = ["graphshard.testing.plugin", "pytester"]
