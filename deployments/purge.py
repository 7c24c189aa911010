"""Deletes the files that nobody needs any more; a kill at any moment only repeats it."""

import contextlib
import itertools
import logging
from collections.abc import Iterator

from sqlalchemy import Engine

from credits.accounts import release_bytes
from deployments.checkpoints import CHECKPOINTS
from deployments.database import reader
from jobs.job import FINAL_STATES
from jobs.retention import ended_in_vain, expired_videos, mark_deleted, mark_purged, purgeable
from jobs.store import JobNotFound, get_job
from media.object_store import ObjectStore
from media.renditions import delete_renditions

logger = logging.getLogger("ray.serve")

UNPUBLISHED_MS = 3_600_000
UNFINISHED_S = 3_600.0


@contextlib.contextmanager
def left_for_later(name: str) -> Iterator[None]:
    """A file that can't be deleted now is found again by a later round, and keeps no other."""
    try:
        yield
    except OSError:
        logger.exception("cannot delete the files of %s", name)


class Purger:
    """Deleted videos at once; what a kill left behind later: inputs, checkpoints, videos."""

    def __init__(self, engine: Engine, store: ObjectStore) -> None:
        self.engine = engine
        self.store = store
        self.suspects: set[str] = set()

    def delete_expired(self) -> None:
        """Delete, as its owner might, every video that was kept for as long as its plan says."""
        with reader(self.engine).begin() as connection:
            expired = expired_videos(connection)
        for job in expired:  # each alone: the account's row is the last that is locked
            with self.engine.begin() as connection:
                num_bytes = mark_deleted(connection, job.id, only_expired=True)
                release_bytes(connection, job.account_id, num_bytes)

    def purge_videos(self) -> None:
        """Delete the files of deleted videos; one that can't be deleted now is left for later."""
        with reader(self.engine).begin() as connection:
            jobs = purgeable(connection)
        for job in jobs:
            with left_for_later(job.id):
                delete_renditions(self.store, job.id)
                with self.engine.begin() as connection:
                    mark_purged(connection, job.id)

    def purge_unpublished(self) -> None:
        """Delete what was published for jobs that then ended without a video.

        Settling does so too, but its process may be killed first, or the encoder of a pipeline that
        has lost its lease publish afterwards.
        """
        with reader(self.engine).begin() as connection:
            ended = ended_in_vain(connection, UNPUBLISHED_MS)
        for job_id in ended:
            with left_for_later(job_id):
                delete_renditions(self.store, job_id)

    def purge_orphans(self) -> None:
        """Delete start images, source videos and checkpoints without an open job.

        An input is stored just before its job is: only what is seen in two rounds is an orphan.
        """
        stored = itertools.chain(self.store.list("inputs/"), self.store.list(CHECKPOINTS))
        orphans = {info.key for info in stored if self._is_orphan(info.key)}
        for key in orphans & self.suspects:
            with left_for_later(key):
                self.store.delete(key)
        self.suspects = orphans

    def purge_unfinished(self) -> None:
        """Delete what was being stored when its process was killed."""
        self.store.delete_unfinished(UNFINISHED_S)

    def _is_orphan(self, key: str) -> bool:
        with reader(self.engine).begin() as connection:
            try:
                job = get_job(connection, key.partition("/")[2].partition(".")[0])
            except JobNotFound:
                return True
        return job.state in FINAL_STATES
