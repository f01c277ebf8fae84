"""Storms over a real control plane, and the judge of what they did."""
