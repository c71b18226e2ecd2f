"""The command line (`ztp --help`): one file a command; `app` is made of them.

Exit codes: 0 what was asked holds, 1 a gate failed, 2 bad request, 3 missing software or device,
130 interrupted.
"""
