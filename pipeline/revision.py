"""Runs named after the revision of their model: a schedule gives the same command, and prunes what is new."""

from pipeline.config import REVISION, RunConfig
from pipeline.files import read_text
from pipeline.models.checkpoint import INDEX_NAME, find_revision
from pipeline.record import RunRecord
from pipeline.store import RunDirectory


def with_revision(config: RunConfig) -> RunConfig:
    """The config with the revision of its model in place of `{revision}` in output.path.

    A model id on the hub is pinned to it: what is read later is what the run is named after. Nothing large is read or
    downloaded. Raises Refusal where there is no such model.
    """
    if REVISION not in config.output.path:
        return config
    model, output = config.model, config.output
    found = find_revision(model.path, model.revision)
    return config.model_copy(
        update={
            "model": model.model_copy(update={"revision": found.commit}),
            "output": output.model_copy(update={"path": output.path.replace(REVISION, found.name)}),
        }
    )


def finished_report(config: RunConfig) -> str | None:
    """The report of a run that has been finished with exactly this config, None where there may be something to do.

    The report is the last file of a run, and only of the config in run.yaml. Nothing else is read, so nothing is
    verified: this is for directories that are named after the revision, which no other model can have.
    """
    directory = RunDirectory(config.output.folder, 0)
    record = RunRecord.read(directory.path)
    is_of_config = record is not None and record.config == config.model_dump(mode="json")
    if not is_of_config or not (directory.model / INDEX_NAME).exists():
        return None
    try:
        return read_text(directory.report_file)
    except FileNotFoundError:
        return None
