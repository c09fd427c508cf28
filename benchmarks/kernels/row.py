"""One line of the kernel table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What a compiler made of one kernel in one configuration on one chip.

    registers: a thread's; shared: bytes of statically known shared memory a block; spilled: bytes of stack and local
    memory a thread (0 is what every shipped kernel must have); matrix: the matrix instructions in it, if any.
    """

    kernel: str
    arch: str
    threads: int
    registers: int
    shared: int
    spilled: int
    matrix: str = ""
