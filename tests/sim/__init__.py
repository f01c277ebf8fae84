"""A simulation of everything: the real controller and the real sessions between a simulated API server, nodes, agents and callers. One seed is one story."""
