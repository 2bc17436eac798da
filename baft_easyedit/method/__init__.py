"""The paper: the intervention, its gates and objective, and what we add to them. Torch only."""
