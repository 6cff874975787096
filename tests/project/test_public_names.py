"""What ``import convpeft`` gives: light, complete, and every error by name."""

from __future__ import annotations

import builtins
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import convpeft
from convpeft import errors

ERRORS = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]


class TestPublicNames:
    def test_import_loads_nothing_heavy(self):
        script = (
            "import sys, torch\n"
            "before = set(sys.modules)\n"
            "import convpeft\n"
            "heavy = {'timm', 'peft', 'transformers', 'torchvision', 'ultralytics', 'accelerate', 'matplotlib'}\n"
            "print(sorted(heavy & set(sys.modules) - before))\n"
            "convpeft.adapter_kinds()\n"
            "convpeft.plan(torch.nn.Conv2d(3, 3, 1), {'rules': [{'match': '', 'kind': 'lora'}]})\n"
            "print(sorted({'peft', 'transformers'} & set(sys.modules) - before))\n"
        )
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
        assert done.stdout.split("\n")[:2] == ["[]", "[]"]

    def test_all_is_sorted_and_complete(self):
        assert convpeft.__all__ == sorted(convpeft.__all__)
        public = {
            name
            for name, value in vars(convpeft).items()
            if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
        }
        assert public == set(convpeft.__all__)

    @pytest.mark.parametrize("error", [pytest.param(error, id=error.__name__) for error in ERRORS])
    def test_every_error_is_exported_and_a_builtin_too(self, error):
        assert getattr(convpeft, error.__name__) is error
        assert issubclass(error, convpeft.ConvPeftError)
        assert error.__doc__
        if error is not convpeft.ConvPeftError:
            also = [base for base in error.__mro__ if getattr(builtins, base.__name__, None) is base]
            assert set(also) - {Exception, BaseException, object}
