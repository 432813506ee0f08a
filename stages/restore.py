"""restore: where dvc.lock names results that are nowhere, let DVC look for its own, or make them anew.

DVC trusts the hashes in dvc.lock: where it finds no such outputs, it runs the stage, though its run cache may hold what
was made of the same inputs. Results in the default remote stay: `dvc repro --pull` gets them.
"""

import json
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.lock import make_lock
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.utils.serialize import modify_yaml

from effvit.errors import UserError, one_line_errors


def main() -> None:
    """Mend DVC's files before it runs.

    Raises:
        UserError: DVC cannot read its files, or reach its remote.
    """
    try:
        with Repo(_wait_for_lock=True) as repo, repo.lock:
            _remove_cut_locks(Path(repo.tmp_dir))
            absent = _absent(repo)
    except DvcException as error:
        hint = "; `git checkout dvc.lock` brings back the last one committed" if "dvc.lock" in str(error) else ""
        raise UserError(f"{error}{hint}") from error
    if absent:
        print(f"dvc.lock: {len(absent)} stages whose results are nowhere; they come from DVC's run cache or run again")


def _remove_cut_locks(directory: Path) -> None:
    """DVC's list of paths in use, where one killed while it wrote left half of it: with that no DVC runs a stage."""
    path = directory / "rwlock"
    with make_lock(str(directory / "rwlock.lock")):
        try:
            json.loads(path.read_bytes())
        except FileNotFoundError:
            pass
        except ValueError:
            path.unlink()


def _absent(repo: Repo) -> list[str]:
    """Stages that were dropped from dvc.lock, as a result is not here, in the cache or in the remote."""
    outs = [
        (stage.name, out)
        for stage in repo.index.stages
        if isinstance(stage, PipelineStage) and stage.path_in_repo == "dvc.yaml"
        for out in stage.outs
        if out.use_cache and out.hash_info and out.changed_cache() and (not out.exists or out.changed_checksum())
    ]
    known = set()
    if outs and repo.config["core"].get("remote"):
        remote = repo.cloud.get_remote_odb(command="repro --pull")
        known = set(remote.oids_exist([out.hash_info.value for _, out in outs]))
    absent = list(dict.fromkeys(name for name, out in outs if out.hash_info.value not in known))
    if absent:
        with modify_yaml("dvc.lock") as lock:
            for name in absent:
                del lock["stages"][name]
    return absent


if __name__ == "__main__":
    with one_line_errors():
        main()
