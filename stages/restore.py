"""restore: where dvc.lock names results of another machine that are nowhere here, let DVC look for this one's own.

DVC trusts the hashes in dvc.lock: where it finds no such outputs, it runs the stage, though its run cache may hold what
this machine made of the same inputs. With a remote, `dvc repro --pull` gets the other machine's results instead.
"""

from dvc.repo import Repo
from dvc.utils.serialize import modify_yaml

with Repo() as repo, repo.lock:
    entries = {stage.addressing: stage for stage in repo.index.stages} if not repo.config["remote"] else {}
    absent = [
        name
        for name, stage in entries.items()
        for out in stage.outs
        if out.use_cache and out.hash_info and out.changed_cache() and (not out.exists or out.changed_checksum())
    ]
    if absent:
        with modify_yaml("dvc.lock") as lock:
            for name in dict.fromkeys(absent):
                del lock["stages"][name]
        count = len(set(absent))
        print(f"dvc.lock: {count} stages whose results are not here; this machine's own come from DVC's cache")
