"""The command line: looks at any store without a framework or an accelerator."""
