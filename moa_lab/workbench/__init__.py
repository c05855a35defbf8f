"""The workbench: what its panels do, as plain objects that a script may use as well, and the panels themselves."""
