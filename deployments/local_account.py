"""The account of the embedded default, and the key in a file that only its owner reads."""

from pathlib import Path

from sqlalchemy import Engine

from credits.accounts import AccountId, create_account, find_account
from credits.api_keys import add_api_key, hash_api_key, is_known, new_api_key
from credits.ledger import grant
from credits.pricing import Credits
from deployments.config import LocalAccountConfig, read_or_create_secret
from deployments.database import exclusive

LOCAL_ACCOUNT = AccountId("local")


def ensure_local_account(
    engine: Engine, config: LocalAccountConfig, home: Path, pepper: bytes
) -> None:
    """Make the account at the first start; let the key of the file speak for it at every start."""
    api_key = read_or_create_secret(home / "api_key", new_api_key())
    with exclusive(engine) as connection:
        if find_account(connection, LOCAL_ACCOUNT) is None:
            create_account(connection, LOCAL_ACCOUNT, "local", config.plan)
            grant(connection, LOCAL_ACCOUNT, Credits(config.credits))
        # At the first start, or after the key file was deleted and made anew. A key that its owner
        # has revoked stays so.
        if not is_known(connection, hash_api_key(api_key, pepper)):
            add_api_key(connection, LOCAL_ACCOUNT, api_key, pepper, name="local")
