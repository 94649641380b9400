"""Reproducible comparisons: what durability costs here, beside raw SQLite and known peers.

`python -m bench` runs every question in one go and writes docs/performance.md. Each contender is
a process in its own environment, and they run turn by turn in rotated order, so that a ratio
compares neighbours in time. Figures are printed and looked at; nothing fails because of one.
"""
