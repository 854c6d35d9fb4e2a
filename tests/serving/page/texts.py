"""What the mock server says."""

FIBONACCI = """    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)


print(fibonacci(10))
"""

SAMPLE = """## How a beaked whale dives

*Ziphius cavirostris* holds the record among **mammals**. Three things make it possible:

1. **Oxygen in the muscles.** Myoglobin stores several times what ours does.
2. **A slow heart.** It falls to a few beats a minute.
   - blood goes to the brain first
   - the rest waits
3. ~~Luck~~ Patience.

| Species | Deepest dive | Longest |
|:--|--:|--:|
| *Ziphius cavirostris* | 2,992 m | 222 min |
| *Physeter macrocephalus* | 2,035 m | 90 min |
| *Homo sapiens* | 130 m | 11 min |

> The record was measured by a tag, see [the paper](https://example.org/dive?x=1&y=2) or `tags.csv`.

A small model of the descent:

```python
@dataclass
class Dive:
    \"\"\"One dive, from breath to breath.\"\"\"

    speed: float = 1.5  # metres a second

    def depth(self, seconds: int) -> float:
        return min(2992.0, self.speed * seconds)


print(f"{Dive().depth(600):.0f} m")
```

- [x] breathe
- [ ] go down

The pressure grows as \\(p = \\rho g h\\), roughly one atmosphere every ten metres.
"""

CODE = """```ts
export async function depth(id: string): Promise<number> {
  const response = await fetch(`/dives/${id}`); // one dive
  return (await response.json()).metres ?? 0;
}
```

```bash
for f in *.csv; do grep -c "$SPECIES" "$f"; done  # count
```

```json
{"species": "Ziphius cavirostris", "metres": 2992, "verified": true}
```
"""

# Every line tries to run something or to reach somebody. Nothing of it may have any effect.
ATTACK = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2">

[click](javascript:window.hacked=3) [data](data:text/html,<script>window.hacked=4</script>)
[tab](java\tscript:window.hacked=5) [vb](vbscript:x) [rel](/etc/passwd) <javascript:window.hacked=6>
![picture](https://evil.example/pixel.png) ![x](x" onerror="window.hacked=7)
[quote](https://a.example/"onmouseover="window.hacked=8) <svg/onload=window.hacked=9>

| <b onclick=window.hacked=10>a</b> | b |
|---|---|
| <iframe src="javascript:window.hacked=11"></iframe> | `<script>window.hacked=12</script>` |

```html"><script>window.hacked=13</script>
<script>window.hacked = 14</script>
```

# <img src=x onerror=window.hacked=15>

**[deep](JaVaScRiPt:window.hacked=16)** and &lt;script&gt; &#106;avascript: ${window.hacked=17}
{{constructor.constructor('window.hacked=18')()}}

<style>body{display:none}</style><base href="https://evil.example/"><meta http-equiv="refresh" content="0;url=https://evil.example/">
"""

LONG = "\n\n".join(
    f"Paragraph {i}. The water is dark and the pressure is high; the whale clicks, listens, turns "
    f"towards the echo, and goes on down to the place where the squid are."
    for i in range(1, 25)
)
