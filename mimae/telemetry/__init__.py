"""Telemetry of a run: records, progress, pictures and clocks."""
