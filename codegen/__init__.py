"""From a transformed Program to an execution plan and the code of its segments."""
