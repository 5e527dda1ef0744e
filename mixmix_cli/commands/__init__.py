"""One module a command: options, one call into recipes, the printed result. `command` is what the group runs."""
