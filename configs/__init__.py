"""Defines configurations, one file per kind of run."""
