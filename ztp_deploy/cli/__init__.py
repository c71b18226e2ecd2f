"""The command line (`ztp --help`): one file a command; `app` is made of them.

Exit codes: 0 what was asked holds, 1 a gate failed, 2 bad request, 3 missing software or device, 4 an engine
library could not build, 70 a fault of this program, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""
