BEGIN TRANSACTION;
CREATE TABLE answers (
        pair TEXT PRIMARY KEY,                            -- hash of the pair's content, so no pair is paid for twice
        label INTEGER NOT NULL CHECK (label IN (1, -1)),  -- 1: y1 preferred, -1: y2 preferred
        source TEXT NOT NULL,                             -- dataset, human, judge, reused
        annotator TEXT NOT NULL DEFAULT '',               -- who, within the source
        margin REAL,                                      -- the policy's margin when it asked, in units of reward
        step INTEGER NOT NULL,                            -- optimiser step that asked, from 0; -1: from another run
        audit INTEGER NOT NULL DEFAULT 0,                 -- asked although the policy was confident
        answered_at REAL NOT NULL,                        -- seconds since 1970
        seconds REAL,                                     -- how long the annotator took
        cost REAL,                                        -- what it cost, if known
        used INTEGER NOT NULL DEFAULT 0                   -- the run has used it, so it can no longer be retracted
    ) WITHOUT ROWID;
INSERT INTO "answers" VALUES('d1',1,'dataset','',0.5,0,0,1000.0,NULL,NULL,1);
INSERT INTO "answers" VALUES('d2',-1,'dataset','',2.0,1,1,1000.0,NULL,NULL,1);
INSERT INTO "answers" VALUES('h1',1,'human','ann',0.25,2,0,1000.0,10.0,0.25,0);
INSERT INTO "answers" VALUES('j1',1,'judge','m',0.1,3,0,1000.0,1.0,0.02,1);
INSERT INTO "answers" VALUES('j2',-1,'judge','m (coin)',0.1,3,0,1000.0,1.0,0.5,0);
INSERT INTO "answers" VALUES('r1',-1,'reused','old',NULL,-1,0,1000.0,NULL,NULL,0);
CREATE TABLE money (id INTEGER PRIMARY KEY CHECK (id = 1), spent REAL NOT NULL);
INSERT INTO "money" VALUES(1,0.77);
CREATE TABLE questions (                -- for people; open until the pair has an answer
        pair TEXT PRIMARY KEY,
        prompt TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL,  -- JSON: a string or a list of messages
        margin REAL, step INTEGER NOT NULL, audit INTEGER NOT NULL, asked_at REAL NOT NULL,
        leased_to TEXT, leased_until REAL                 -- who is looking at it, and until when
    ) WITHOUT ROWID;
INSERT INTO "questions" VALUES('h1','"p"','"a"','"b"',0.25,2,0,1000.0,NULL,NULL);
INSERT INTO "questions" VALUES('h2','"p"','"a"','"b"',-0.5,2,0,1000.0,NULL,NULL);
CREATE TABLE totals (step INTEGER PRIMARY KEY, answers INTEGER NOT NULL, unpriced INTEGER NOT NULL);
INSERT INTO "totals" VALUES(0,1,1);
INSERT INTO "totals" VALUES(1,1,1);
INSERT INTO "totals" VALUES(2,1,0);
INSERT INTO "totals" VALUES(3,2,0);
CREATE TABLE verdicts (                 -- everything said: both orders of a judge, second opinions
        id INTEGER PRIMARY KEY,
        pair TEXT NOT NULL, annotator TEXT NOT NULL,
        verdict INTEGER NOT NULL CHECK (verdict IN (1, 0, -1)),           -- 0: no preference, or an unusable reply
        seconds REAL, cost REAL, detail TEXT, at REAL NOT NULL
    );
INSERT INTO "verdicts" VALUES(1,'h1','ann',1,10.0,0.25,NULL,1000.0);
INSERT INTO "verdicts" VALUES(2,'j1','m',1,0.5,0.01,'{"order": 1, "said": "A"}',1000.0);
INSERT INTO "verdicts" VALUES(3,'j1','m',1,0.5,0.01,'{"order": -1, "said": "B"}',1000.0);
CREATE INDEX audits ON answers (step, margin, label, audit) WHERE audit;
CREATE INDEX verdicts_by_pair ON verdicts (pair);
CREATE TRIGGER answer_counted AFTER INSERT ON answers WHEN NEW.step >= 0 BEGIN
        INSERT INTO totals VALUES (NEW.step, 1, NEW.cost IS NULL)
            ON CONFLICT (step) DO UPDATE SET answers = answers + 1, unpriced = unpriced + excluded.unpriced;
    END;
CREATE TRIGGER answer_uncounted AFTER DELETE ON answers WHEN OLD.step >= 0 BEGIN
        UPDATE totals SET answers = answers - 1, unpriced = unpriced - (OLD.cost IS NULL) WHERE step = OLD.step;
    END;
CREATE VIEW own_costs AS                -- answers without verdicts; otherwise the verdicts hold the cost
        SELECT pair, cost FROM answers WHERE step >= 0 AND cost IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM verdicts WHERE verdicts.pair = answers.pair);
CREATE TRIGGER answer_paid AFTER INSERT ON answers WHEN NEW.cost IS NOT NULL BEGIN
        UPDATE money SET spent = spent + (SELECT TOTAL(cost) FROM own_costs WHERE pair = NEW.pair);
    END;
CREATE TRIGGER answer_refunded BEFORE DELETE ON answers WHEN OLD.cost IS NOT NULL BEGIN
        UPDATE money SET spent = spent - (SELECT TOTAL(cost) FROM own_costs WHERE pair = OLD.pair);
    END;
CREATE TRIGGER verdict_paid BEFORE INSERT ON verdicts BEGIN
        UPDATE money SET spent = spent + COALESCE(NEW.cost, 0)
            - (SELECT TOTAL(cost) FROM own_costs WHERE pair = NEW.pair);
    END;
CREATE TRIGGER verdict_refunded AFTER DELETE ON verdicts BEGIN
        UPDATE money SET spent = spent - COALESCE(OLD.cost, 0)
            + (SELECT TOTAL(cost) FROM own_costs WHERE pair = OLD.pair);
    END;
COMMIT;
