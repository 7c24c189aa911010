"""Becomes another program after it has limited what that may take.

Run by path: MEMORY_BYTES CPU_SECONDS PROGRAM ARGUMENT... The program may write no files.
"""

import os
import resource
import sys

if __name__ == "__main__":
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    os.execv(sys.argv[3], sys.argv[3:])
