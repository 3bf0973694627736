"""Coord."""
