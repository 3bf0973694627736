"""Save: structure, plan, stage, write, commit; `saver` knows their order."""
