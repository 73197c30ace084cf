"""What runs inside the sandbox: gives up all rights, then runs the program. Its text is given to a bare interpreter by `-c`.

    python ... -c TEXT DESCRIPTOR

The descriptor holds the job (`tic_megatron.rewards.sandbox` writes it): a line of lengths, then the parts one after another.
Until the filter of system calls is in force only this file and the standard library have run.
"""

import builtins
import ctypes
import os
import resource
import sys

STARTED = b"\x06"
"""Written to stderr before the program's first instruction; without it, it is the sandbox that has failed."""
OUT_OF_MEMORY = 86
"""Exit status."""
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL = 9
MOST_DESCRIPTORS = 1 << 16
RECURSION_LIMIT = INTEGER_DIGITS = 50_000
"""Both are LiveCodeBench's; the digits, of an integer that is read or printed."""


def read_job(descriptor):
    """The job's parts; neither it nor anything else but the three standard streams stays open."""
    with open(descriptor, "rb") as file:
        lengths = file.readline().split()
        parts = [file.read(int(length)) for length in lengths]
    os.closerange(3, MOST_DESCRIPTORS)
    return parts


def give_up_rights(limits, user, call_filter):
    """Limits, an unprivileged user, no new rights, and only the system calls that the filter allows."""
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (limit, limit))
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    libc = ctypes.CDLL(None, use_errno=True)
    program = ctypes.create_string_buffer(call_filter, len(call_filter))

    class FilterProgram(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    pointer = FilterProgram(len(call_filter) // 8, ctypes.addressof(program))
    for arguments in (
        (PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0),
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, 2, ctypes.byref(pointer), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")


def call(module, function, arguments, dumps, channel):
    """Call the program's function, and send what it returns."""
    owner = module.Solution() if hasattr(module, "Solution") else module
    text = dumps(getattr(owner, function)(*arguments))
    data = memoryview(text.encode())
    while data:
        data = data[os.write(channel, data) :]
    os._exit(0)  # what else it has begun does not matter


def main():
    program, prelude, imports, function, values, limits, user, call_filter = read_job(int(sys.argv[1]))
    program, function, values = program.decode(), function.decode(), values.decode()
    sys.set_int_max_str_digits(INTEGER_DIGITS)
    channel = 1
    dumps = arguments = None
    if function:  # what the program prints is not what it returns
        from json import dumps, loads  # type: ignore[assignment]

        arguments = [loads(value) for value in values.split("\n")] if values else []
        channel = os.dup(1)
        os.dup2(2, 1)
    module = type(sys)("solution" if function else "__main__")
    sys.modules[module.__name__] = module
    for name in imports.decode().split():  # where nothing can be opened later
        source, _, part = name.partition(":")
        try:
            getattr(__import__(source, fromlist=[part or "x"]), part, None)  # some load their parts when they are asked for
        except Exception:
            continue
    sys.argv = ["program.py"]
    exec(compile(prelude, "prelude", "exec", dont_inherit=True), module.__dict__)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # `site` would bring them
    sys.setrecursionlimit(RECURSION_LIMIT)
    if os.path.isdir("/tmp") and not imports:
        os.chdir("/tmp")
    limits = dict(zip(limits.decode().split()[::2], map(int, limits.decode().split()[1::2]), strict=True))
    give_up_rights(limits, int(user), call_filter)
    os.write(2, STARTED)
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), module.__dict__)
        if function:
            call(module, function, arguments, dumps, channel)
    except SystemExit:
        if function:
            raise
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


main()
