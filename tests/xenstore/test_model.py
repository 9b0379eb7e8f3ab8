# SPDX-License-Identifier: MIT
"""The tree and its transactions against a model that is too simple to be wrong: dictionaries, copied whole."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.xenstore.story import World

PATHS = ["/a", "/b", "/a/x", "/a/y", "/a/x/1", "/b/x", "/b/x/1/2"]
paths = st.sampled_from(PATHS)
values = st.sampled_from(["", "1", "two"])

Tree = dict[str, str]


def parents(path: str) -> list[str]:
    words = path.split("/")
    return ["/".join(words[:i]) or "/" for i in range(1, len(words))]


def children(tree: Tree, path: str) -> list[str]:
    prefix = path.rstrip("/") + "/"
    return [p[len(prefix) :] for p in tree if p.startswith(prefix) and "/" not in p[len(prefix) :] and p != path]


class Model:
    """One view of the tree; a transaction's has its own copy, which is what it looks at the world through."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def write(self, path: str, value: str) -> str:
        for parent in parents(path):
            self.tree.setdefault(parent, "")
        self.tree[path] = value
        return "OK"

    def mkdir(self, path: str) -> str:
        return "OK" if path in self.tree else self.write(path, "")

    def rm(self, path: str) -> str:
        if path not in self.tree:
            return "OK" if parents(path)[-1] in self.tree else "! ENOENT"
        for gone in [p for p in self.tree if p == path or p.startswith(path + "/")]:
            del self.tree[gone]
        return "OK"

    def read(self, path: str) -> str:
        return self.tree.get(path, "! ENOENT")

    def ls(self, path: str) -> list[str] | None:
        return children(self.tree, path) if path in self.tree else None


class StoreMachine(RuleBasedStateMachine):
    """Dom0 changes the tree outside and inside of transactions.

    A transaction of the model works on a copy. It must commit if nobody changed anything since its start, and if it
    commits although somebody did, then its changes must be what they would be now.
    """

    transactions = Bundle("transactions")

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.model = Model({"/": "", "/tool": "", "/tool/xenstored": ""})
        self.n_changes = 0

    def _both(self, op: str, path: str, value: str | None, expected: str, transaction: int = 0) -> None:
        arguments = f"{path}|" if value is None else f"{path}|{value}"
        assert self.world.ask("dom0", op, arguments, transaction) == expected

    @rule(path=paths, value=values)
    def write(self, path: str, value: str) -> None:
        self.n_changes += 1
        self._both("WRITE", path, value, self.model.write(path, value))

    @rule(path=paths)
    def mkdir(self, path: str) -> None:
        self.n_changes += path not in self.model.tree
        self._both("MKDIR", path, None, self.model.mkdir(path))

    @rule(path=paths)
    def rm(self, path: str) -> None:
        self.n_changes += path in self.model.tree
        self._both("RM", path, None, self.model.rm(path))

    @rule(path=paths)
    def read(self, path: str) -> None:
        self._both("READ", path, None, self.model.read(path))

    @rule(path=st.sampled_from([*PATHS, "/"]))
    def ls(self, path: str) -> None:
        expected = self.model.ls(path)
        reply = self.world.ask("dom0", "DIRECTORY", f"{path}|")
        if expected is None:
            assert reply == "! ENOENT"
        else:
            assert sorted(reply.split("|")[:-1]) == sorted(expected)

    @rule(target=transactions)
    def start(self) -> tuple[int, Model, int, list[tuple[str, str, str]]]:
        number = int(self.world.ask("dom0", "TRANSACTION_START").rstrip("|"))
        return number, Model(dict(self.model.tree)), self.n_changes, []

    @rule(transaction=transactions, op=st.sampled_from(["WRITE", "MKDIR", "RM"]), path=paths, value=values)
    def change_in_transaction(
        self, transaction: tuple[int, Model, int, list[tuple[str, str, str]]], op: str, path: str, value: str
    ) -> None:
        number, model, n_changes, done = transaction
        if n_changes != self.n_changes:
            return  # what it sees is a mixture from now on
        expected = _apply(model, op, path, value)
        done.append((op, path, value))
        self._both(op, path, value if op == "WRITE" else None, expected, number)
        self._both("READ", path, None, model.read(path), number)

    @rule(transaction=transactions, path=paths)
    def read_in_transaction(self, transaction: tuple[int, Model, int, list[tuple[str, str, str]]], path: str) -> None:
        number, model, n_changes, _ = transaction
        if n_changes == self.n_changes:
            self._both("READ", path, None, model.read(path), number)

    @rule(transaction=consumes(transactions), commit=st.booleans())
    def end(self, transaction: tuple[int, Model, int, list[tuple[str, str, str]]], commit: bool) -> None:
        number, _, n_changes, done = transaction
        reply = self.world.ask("dom0", "TRANSACTION_END", "T|" if commit else "F|", number)
        if not commit:
            assert reply == "OK"
            return
        if n_changes == self.n_changes:
            assert reply == "OK"
        assert reply in ("OK", "! EAGAIN")
        if reply == "OK":
            for op, path, value in done:
                before = len(self.model.tree), self.model.tree.get(path)
                _apply(self.model, op, path, value)
                self.n_changes += op == "WRITE" or before != (len(self.model.tree), self.model.tree.get(path))

    @invariant()
    def same_tree(self) -> None:
        tree = self.world.tree()
        assert {path: value for path, (value, _) in tree.items()} == self.model.tree
        assert self.world.owners() == {0: len(tree)}
        assert self.world.hub.check() == []


def _apply(model: Model, op: str, path: str, value: str) -> str:
    if op == "WRITE":
        return model.write(path, value)
    return model.mkdir(path) if op == "MKDIR" else model.rm(path)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
