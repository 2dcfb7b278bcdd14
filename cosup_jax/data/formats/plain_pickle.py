"""Pickles of plain lists, dicts, text and numbers, read so that they can do no harm."""

import pickle
import pickletools
from pathlib import Path
from typing import Any

from cosup_jax.data.rows import open_file
from cosup_jax.errors import UserError

# Everything plain containers need. Globals are known to be refused by their name; sets, and all
# that calls, imports, looks up, or claims memory ahead of its bytes, are not.
_PLAIN = (
    "PROTO FRAME STOP MARK POP POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS "
    "GLOBAL STACK_GLOBAL"
)
_NAMES = {ord(code.code): code.name for code in pickletools.opcodes}


def read_pickle(path: Path) -> Any:
    """What is in the file. Raises UserError if that is not plain data, or not whole."""
    with open_file(path) as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8").load()
        except _Refused as error:
            raise UserError(
                f"{path}: this pickle holds {error}; only plain lists, dicts, text and numbers "
                "are read: save it with these"
            ) from None
        except Exception as error:  # damaged bytes may raise anything
            raise UserError(
                f"{path}: not a whole pickle ({type(error).__name__}); fetch the file again"
            ) from None


class _Refused(Exception):
    pass


class _PlainUnpickler(pickle._Unpickler):
    """The one in Python: in C's, ten bytes make the table of memos grow to 64 GiB."""

    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(f"a {module}.{name}")

    def refuse(self) -> None:
        raise _Refused("more than plain data")

    def set_item(self) -> None:
        self._check_keys(self.stack[-2:-1])
        self.load_setitem()

    def set_items(self) -> None:
        self._check_keys(self.stack[::2])
        self.load_setitems()

    def new_dict(self) -> None:
        self._check_keys(self.stack[::2])
        self.load_dict()

    def _check_keys(self, keys: list) -> None:
        # Hashing nested tuples that share their parts takes exponential time.
        if not all(isinstance(key, (str, int)) for key in keys):
            raise _Refused("a dict with keys that are neither text nor numbers")


_PlainUnpickler.dispatch = {
    code: load if _NAMES[code] in _PLAIN.split() else _PlainUnpickler.refuse
    for code, load in pickle._Unpickler.dispatch.items()
} | {
    pickle.SETITEM[0]: _PlainUnpickler.set_item,
    pickle.SETITEMS[0]: _PlainUnpickler.set_items,
    pickle.DICT[0]: _PlainUnpickler.new_dict,
}
