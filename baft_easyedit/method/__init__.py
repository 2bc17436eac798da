"""The paper's intervention, gates and objective, and our additions to them. Needs torch only."""
