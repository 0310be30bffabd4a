"""Measuring a case: each variant is checked against the oracle, then all that passed are timed together."""
