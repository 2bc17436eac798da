"""Theorem 2.3 on a real model: stable balls of hidden states, and what a linear edit does to them.

`balls` has the definitions, and the theorem in our reading; `measure` finds the numbers of one fact
in a model; `show` draws them, and writes them down.
"""
