"""What a run found: records, tables on the screen, files, targets and the closing sentence."""
