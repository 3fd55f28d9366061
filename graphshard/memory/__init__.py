"""What a step keeps, when and where: peaks by simulation, layouts of blocks, and the planner that a budget asks for."""
