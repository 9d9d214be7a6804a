PRAGMA journal_mode = WAL;
PRAGMA application_id = 1684103539;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE adverts (
    peer_id TEXT NOT NULL,
    model_root TEXT NOT NULL,
    seq INTEGER NOT NULL,
    expires_at REAL NOT NULL,
    signed BLOB NOT NULL,               -- msgpack of messages.Signed, checked again when it is read
    PRIMARY KEY (peer_id, model_root)
) STRICT;
INSERT INTO "adverts" VALUES('12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp','abababababababababababababababababababababababababababababababab',1,1800000600.0,X'83AA7075626C69635F6B6579C4200000000000000000000000000000000000000000000000000000000000000000A97369676E6174757265C44000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000A77061796C6F6164C40B616476657274206F662031');
INSERT INTO "adverts" VALUES('12D3KooWHdiAxVd8uMQR1hGWXccidmfCwLqcMpGwR6QcTP6QRMuD','abababababababababababababababababababababababababababababababab',1,1800000600.0,X'83AA7075626C69635F6B6579C4200000000000000000000000000000000000000000000000000000000000000000A97369676E6174757265C44000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000A77061796C6F6164C40B616476657274206F662032');
CREATE TABLE calls (
    hour INTEGER NOT NULL,              -- Unix time / 3600
    direction TEXT NOT NULL CHECK (direction IN ('served', 'asked')),
    peer_id TEXT NOT NULL,              -- empty: all those beyond the limit together
    model_root TEXT NOT NULL,
    calls INTEGER NOT NULL,
    rows INTEGER NOT NULL,
    bytes_in INTEGER NOT NULL,          -- of bodies, as this node received them
    bytes_out INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    PRIMARY KEY (hour, direction, peer_id, model_root)
) STRICT, WITHOUT ROWID;
INSERT INTO "calls" VALUES(500000,'served','12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp','abababababababababababababababababababababababababababababababab',1,2,3,4,5);
CREATE TABLE deployed_layers (
    deployment_id INTEGER NOT NULL REFERENCES deployments (id) ON DELETE CASCADE,
    layer INTEGER NOT NULL,
    experts BLOB NOT NULL,              -- bitmap, as in messages.Advert
    PRIMARY KEY (deployment_id, layer)
) STRICT, WITHOUT ROWID;
INSERT INTO "deployed_layers" VALUES(1,0,X'0102');
INSERT INTO "deployed_layers" VALUES(1,3,X'04');
CREATE TABLE deployments (
    id INTEGER PRIMARY KEY,
    model_root TEXT NOT NULL,
    dtype TEXT NOT NULL CHECK (dtype IN ('f32', 'bf16', 'f16')),
    name TEXT NOT NULL,
    source TEXT NOT NULL,               -- what the model is found by again: a name or a folder
    created_at REAL NOT NULL,
    UNIQUE (model_root, dtype)
) STRICT;
INSERT INTO "deployments" VALUES(1,'abababababababababababababababababababababababababababababababab','f32','m','/models/m',1800000000.0);
CREATE TABLE models (
    folder TEXT PRIMARY KEY,
    model_root TEXT NOT NULL,
    name TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('moe', 'dense')),
    used_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO "models" VALUES('/models/m','abababababababababababababababababababababababababababababababab','m','moe',1800000000.0);
CREATE TABLE peers (
    peer_id TEXT PRIMARY KEY,
    addrs TEXT NOT NULL,                -- JSON array of multiaddresses
    agent TEXT NOT NULL,
    first_seen REAL NOT NULL,           -- Unix time, s; so are all times here
    last_seen REAL NOT NULL,
    failures INTEGER NOT NULL           -- in a row, at the time of writing
) STRICT, WITHOUT ROWID;
INSERT INTO "peers" VALUES('12D3KooW9yQCGhk2Jz1yDYxiTrpkDs2Bp8UobHR1t7JDa31djz3m','["/ip4/192.0.2.20/tcp/4001"]','test/20',1800000000.0,1800000020.0,0);
INSERT INTO "peers" VALUES('12D3KooWB48q6TvbNtRPA5JfaaTuxjvMV2kwooYyz7frVUJ6yHTK','["/ip4/192.0.2.12/tcp/4001"]','test/12',1800000000.0,1800000012.0,0);
INSERT INTO "peers" VALUES('12D3KooWBHX3ToeT4WE48qd1bJz3P5QrNBKyziSdiNYP3viSNQiK','["/ip4/192.0.2.29/tcp/4001"]','test/29',1800000000.0,1800000029.0,0);
INSERT INTO "peers" VALUES('12D3KooWDmc8p5zhTkrwwcELBkig5nGLpzqfA9v52cif16xJVWnJ','["/ip4/192.0.2.13/tcp/4001"]','test/13',1800000000.0,1800000013.0,0);
INSERT INTO "peers" VALUES('12D3KooWDtmrZFKevvSy7fLD7Vo3x38wUCEB3dMPe2n5F5KX9fsR','["/ip4/192.0.2.24/tcp/4001"]','test/24',1800000000.0,1800000024.0,0);
INSERT INTO "peers" VALUES('12D3KooWE3quQCP6Xu7eXpcmmpwVS1KofWnPCBWYNHCswgaqwCso','["/ip4/192.0.2.7/tcp/4001"]','test/7',1800000000.0,1800000007.0,0);
INSERT INTO "peers" VALUES('12D3KooWENWdxokzwyRj9J7MZMS4P825PaDGyj9wBjSMByTucvDG','["/ip4/192.0.2.11/tcp/4001"]','test/11',1800000000.0,1800000011.0,0);
INSERT INTO "peers" VALUES('12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp','["/ip4/192.0.2.1/tcp/4001"]','test/1',1800000000.0,1800000001.0,0);
INSERT INTO "peers" VALUES('12D3KooWF9PqFCdboSo7FTmbuwQqj2A49xvxutKQZCyWo6fXYqJw','["/ip4/192.0.2.17/tcp/4001"]','test/17',1800000000.0,1800000017.0,0);
INSERT INTO "peers" VALUES('12D3KooWFNChUebWM7RHCWhypQs6rvs6B8RtKeFXxtR3zT3fchCU','["/ip4/192.0.2.10/tcp/4001"]','test/10',1800000000.0,1800000010.0,0);
INSERT INTO "peers" VALUES('12D3KooWGGKyv2hiL65EB5LtQsh9TtBovM7Wch6ak68KanuyPeqi','["/ip4/192.0.2.21/tcp/4001"]','test/21',1800000000.0,1800000021.0,0);
INSERT INTO "peers" VALUES('12D3KooWGmiTkr45KcVLC3UxTj6fqk9WgVsn5ccTh4v1EKEu3JaH','["/ip4/192.0.2.15/tcp/4001"]','test/15',1800000000.0,1800000015.0,0);
INSERT INTO "peers" VALUES('12D3KooWGut7zdrSs6TE6WVHVWmXpdURjSJje2S8yuw1Jf4kz2Bx','["/ip4/192.0.2.26/tcp/4001"]','test/26',1800000000.0,1800000026.0,0);
INSERT INTO "peers" VALUES('12D3KooWGyXUfTbVfRdz5axhNSpHkryLQkcAqjiNySwVfVT5R3QF','["/ip4/192.0.2.18/tcp/4001"]','test/18',1800000000.0,1800000018.0,0);
INSERT INTO "peers" VALUES('12D3KooWHdiAxVd8uMQR1hGWXccidmfCwLqcMpGwR6QcTP6QRMuD','["/ip4/192.0.2.2/tcp/4001"]','test/2',1800000000.0,1800000002.0,0);
INSERT INTO "peers" VALUES('12D3KooWHyLexGAV9ywmj94NYVmbngDqSvgd7XMX9VXcsn92PPpk','["/ip4/192.0.2.22/tcp/4001"]','test/22',1800000000.0,1800000022.0,0);
INSERT INTO "peers" VALUES('12D3KooWKXJWo5Tisq4hNif9wwBgdUVwErK5RijYST2yXEpt3N6p','["/ip4/192.0.2.14/tcp/4001"]','test/14',1800000000.0,1800000014.0,0);
INSERT INTO "peers" VALUES('12D3KooWKtPThw8d7WWrfsPz38gQacQ7kkEQGzexgpoH77PLiWcT','["/ip4/192.0.2.27/tcp/4001"]','test/27',1800000000.0,1800000027.0,0);
INSERT INTO "peers" VALUES('12D3KooWMz5U7fR8mF5DNhZSSyFN8c19kU63xYopzDSNCzoFigYk','["/ip4/192.0.2.6/tcp/4001"]','test/6',1800000000.0,1800000006.0,0);
INSERT INTO "peers" VALUES('12D3KooWNHBKuurUCGYNgrWXkNEhro54KonoEvKkjaB3QGKoMNzt','["/ip4/192.0.2.16/tcp/4001"]','test/16',1800000000.0,1800000016.0,0);
INSERT INTO "peers" VALUES('12D3KooWNcx5xKjEvC3gBkuQDEk2d4eJN5bxTDMMb3VLNqZ9VVuB','["/ip4/192.0.2.8/tcp/4001"]','test/8',1800000000.0,1800000008.0,0);
INSERT INTO "peers" VALUES('12D3KooWQMkbZgBmjXpCFAXUoH6MfByoEnMaeNfdGrQ2o3fTRUwE','["/ip4/192.0.2.19/tcp/4001"]','test/19',1800000000.0,1800000019.0,0);
INSERT INTO "peers" VALUES('12D3KooWQVMXU6RHivyUpmuLG8jzGEcwvqKMLdkyMK1TPFA4Lfpa','["/ip4/192.0.2.23/tcp/4001"]','test/23',1800000000.0,1800000023.0,0);
INSERT INTO "peers" VALUES('12D3KooWQZgtLHTvskq8z6pnCFa4UhH7cPj4tK43LUhyZFtwH1tg','["/ip4/192.0.2.28/tcp/4001"]','test/28',1800000000.0,1800000028.0,0);
INSERT INTO "peers" VALUES('12D3KooWQizATZJGTZSb8ShuaniCCaDCBQSczRQ38QgvWH3sJj9c','["/ip4/192.0.2.9/tcp/4001"]','test/9',1800000000.0,1800000009.0,0);
INSERT INTO "peers" VALUES('12D3KooWQoRLy4xFVHfLPuhB9DMZKsohifVXtMXij7JqypgqwKtM','["/ip4/192.0.2.25/tcp/4001"]','test/25',1800000000.0,1800000025.0,0);
INSERT INTO "peers" VALUES('12D3KooWSCufgHzV4fCwRijfH2k3abrpAJxTKxEvN1FDuRXA2U9x','["/ip4/192.0.2.3/tcp/4001"]','test/3',1800000000.0,1800000003.0,0);
INSERT INTO "peers" VALUES('12D3KooWSsChzF81YDUKpe9Uk5AHV5oqAaXAcWNSPYgoLauUk4st','["/ip4/192.0.2.4/tcp/4001"]','test/4',1800000000.0,1800000004.0,0);
INSERT INTO "peers" VALUES('12D3KooWSuTq6MG9gPt7qZqLFKkYrfxMewTZhj9nmRHJkPwzWDG2','["/ip4/192.0.2.5/tcp/4001"]','test/5',1800000000.0,1800000005.0,0);
CREATE TABLE standings (
    peer_id TEXT NOT NULL,
    model_root TEXT NOT NULL,
    passed REAL NOT NULL,               -- audited calls; they decay, see core/reputation.py
    failed REAL NOT NULL,
    suspicion REAL NOT NULL,
    updated_at REAL NOT NULL,
    banned_at REAL NOT NULL,            -- 0: it isn't
    reason TEXT NOT NULL,
    PRIMARY KEY (peer_id, model_root)
) STRICT, WITHOUT ROWID;
INSERT INTO "standings" VALUES('12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp','abababababababababababababababababababababababababababababababab',3.5,1.0,0.5,1800000001.0,0.0,'late');
INSERT INTO "standings" VALUES('12D3KooWHdiAxVd8uMQR1hGWXccidmfCwLqcMpGwR6QcTP6QRMuD','abababababababababababababababababababababababababababababababab',3.5,1.0,0.5,1800000002.0,1800000000.0,'late');
CREATE INDEX peers_by_age ON peers (last_seen);
CREATE INDEX adverts_by_expiry ON adverts (expires_at);
COMMIT;
