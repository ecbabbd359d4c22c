"""What a run reports: records, progress, pictures and clocks."""
