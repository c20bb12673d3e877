"""A mistake on any script's command line: one sentence, exit code 2, nothing written."""
import importlib

import pytest

from tests.test_layout import SCRIPTS
from utils import run_cli


@pytest.mark.parametrize("script", sorted(SCRIPTS | {"data", "figures"}))
@pytest.mark.parametrize("argv", [["--nonsense"], ["--seed", "tomorrow", "--nonsense", "1"]])
def test_mistaken_flags_get_one_sentence(script, argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: module.main(argv))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
