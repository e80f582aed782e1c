from moacompress.healer.healing import heal


def test_try(healable, small, tmp_path):
    for kw in (dict(), dict(train="lora", lr=5e-3, rank=4), dict(objective="echoatt", checkpointing=True)):
        r = heal(healable["model"], tmp_path / ("o%d" % len(str(kw))), profile=healable["profile"], recipe=small(**kw))
        print(r.notes, r.losses)
        print(sorted(p.name for p in tmp_path.iterdir()))
