"""moa-lab on the command line: a file for each group of commands, put together in `app`."""
