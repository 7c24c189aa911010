"""The account of the embedded default, and the key in a file that only its owner reads."""

from pathlib import Path

from sqlalchemy import Engine

from credits.accounts import (
    AccountId,
    Unauthenticated,
    account_of_key,
    add_api_key,
    create_account,
    find_account,
    hash_api_key,
    new_api_key,
)
from credits.ledger import grant
from credits.pricing import Credits
from deployments.config import LocalAccountConfig, read_or_create_secret

LOCAL_ACCOUNT = AccountId("local")


def ensure_local_account(
    engine: Engine, config: LocalAccountConfig, home: Path, pepper: bytes
) -> None:
    """Make the account at the first start; let the key of the file speak for it at every start."""
    api_key = read_or_create_secret(home / "api_key", new_api_key())
    key_hash = hash_api_key(api_key, pepper)
    with engine.begin() as connection:
        if find_account(connection, LOCAL_ACCOUNT) is None:
            create_account(connection, LOCAL_ACCOUNT, "local", config.plan, key_hash)
            grant(connection, LOCAL_ACCOUNT, Credits(config.credits))
        try:
            account_of_key(connection, key_hash)
        except Unauthenticated:  # the key file was deleted and made anew
            add_api_key(connection, LOCAL_ACCOUNT, key_hash)
