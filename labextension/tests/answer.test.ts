import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { type Language, translator } from '../src/i18n'
import type { Shown, StateOf } from '../src/view'
import { answerView } from '../src/views/answer/view'
import { boundWords } from '../src/views/bound'
import { phaseWords } from '../src/views/phase'
import type { AnswerEvent, Command } from '../src/wire'

type State = StateOf<'answer'>

const STATE: State = {
  type: 'answer', model: 'qwen', placement: { disk: 11, gpu: 27, 'ram-streamed': 62 }, bound_by: 'bus to cuda:0, 25.0 GB/s', streams_text: true,
}
const EVENT: AnswerEvent = {
  type: 'answer', view: 'a', seq: 1, text: '', whole: false, phase: 'generating', done: 0, total: 0, unit: '', tokens: 0,
  elapsed_s: 0, first_token_s: 0, generation_tps: 0, tokens_per_sweep: 1,
}

let root: HTMLElement
let sent: Command[]
let shown: Shown<State>

function show(state: Partial<State> = {}, language: Language = 'en'): void {
  root = document.createElement('div')
  document.body.replaceChildren(root)
  sent = []
  shown = answerView({ ...STATE, ...state }, { root, view: 'a', language, t: translator(language), send: command => sent.push(command) })
}
const say = (event: Partial<AnswerEvent>) => shown.event({ ...EVENT, ...event })
const find = (selector: string) => root.querySelector<HTMLElement>(selector)
const words = (selector: string) => find(selector)?.textContent ?? ''
const log = () => find('[role=log]') as HTMLElement

/** jsdom has no layout: give the text area one. */
function scrolls(all: number, seen: number): void {
  Object.defineProperties(log(), {
    scrollHeight: { configurable: true, get: () => all }, clientHeight: { configurable: true, get: () => seen },
  })
}
function scrollTo(top: number): void {
  log().scrollTop = top
  log().dispatchEvent(new Event('scroll'))
}

// jsdom has timers of its own: only what the views use is faked.
beforeEach(() => vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval', 'performance'] }))
afterEach(() => {
  shown.cleanup()
  vi.useRealTimers()
})

test('deltas are appended in order, and old ones ignored', () => {
  show()
  say({ seq: 1, text: 'Hello' })
  say({ seq: 2, text: ' world' })
  say({ seq: 2, text: ' world' })
  say({ seq: 1, text: 'Hello' })
  expect(log().textContent).toBe('Hello world')
  expect(sent).toEqual([])
})

test('a gap asks once for all of it, and deltas wait until it is there', () => {
  show()
  say({ seq: 1, text: 'one ' })
  say({ seq: 3, text: 'three ' })
  say({ seq: 4, text: 'four ' })
  expect(sent).toEqual([{ type: 'hello', view: 'a' }])
  expect(log().textContent).toBe('one ')
  say({ seq: 5, text: 'one two three four five ', whole: true })
  say({ seq: 6, text: 'six' })
  expect(log().textContent).toBe('one two three four five six')
  say({ seq: 9, text: 'nine' })
  expect(sent).toHaveLength(2)
})

test('a question may be lost: it is asked again, now and then', () => {
  show()
  say({ seq: 1, text: 'one ' })
  for (let seq = 3; seq < 83; seq++) say({ seq, text: 'more ' })
  expect(sent).toHaveLength(2)
  say({ seq: 83, text: 'more ' })
  expect(sent).toHaveLength(3)
  say({ seq: 84, text: 'all of it', whole: true })
  say({ seq: 85, text: '.' })
  expect(log().textContent).toBe('all of it.')
  expect(sent).toHaveLength(3)
})

test('a whole one may carry the number of the last delta, and replaces what is there', () => {
  show()
  say({ seq: 2, text: 'lost' })
  say({ seq: 2, text: 'first and lost', whole: true })
  expect(log().textContent).toBe('first and lost')
  say({ seq: 3, text: 'another text', whole: true })
  expect(log().textContent).toBe('another text')
  say({ seq: 1, text: 'old', whole: true })
  expect(log().textContent).toBe('another text')
})

test('what a model writes is text, never HTML', () => {
  const payload = '<img src=x onerror=alert(1)><script>alert(2)</script><svg onload=alert(3)>[a](javascript:alert(4))'
  show({ model: payload, bound_by: payload, placement: { [payload]: 100 } })
  say({ text: payload })
  shown.lost(payload)
  expect(log().textContent).toBe(payload)
  expect(root.querySelectorAll('img, script, svg, a')).toHaveLength(0)
})

test('two thousand tokens are appended to a few nodes', () => {
  show()
  const log_ = log()
  const piece = 'twenty-five characters .\n'
  for (let seq = 1; seq <= 2000; seq++) say({ seq, text: piece })
  expect(log_.textContent).toBe(piece.repeat(2000))
  expect(log_.childNodes.length).toBeLessThanOrEqual(3)
  expect([...log_.childNodes].every(node => node.nodeType === Node.TEXT_NODE)).toBe(true)
})

test('a long whole text is cut between characters, not inside of one', () => {
  show()
  const text = `x${'😀'.repeat(30_000)}`
  say({ text, whole: true })
  expect(log().textContent).toBe(text)
  for (const node of log().childNodes) expect(node.textContent).not.toMatch(/^[\udc00-\udfff]|[\ud800-\udbff]$/)
})

test('the phase says what is read, with a tick for every layer', () => {
  show()
  expect(words('.answer-phase')).toBe('starting')
  say({ phase: 'prefill', done: 12, total: 30, unit: 'layers', elapsed_s: 3.2 })
  expect(words('.answer-phase')).toBe('reading the prompt, 12 of 30 layers')
  const bar = find('[role=progressbar]')
  expect(bar?.getAttribute('aria-valuenow')).toBe('40')
  expect(bar?.getAttribute('aria-valuetext')).toContain('12 of 30 layers')
  expect(bar?.style.getPropertyValue('--ticks')).toBe('30')
  say({ seq: 2, phase: 'generating' })
  expect(bar?.hidden).toBe(true)
})

test('phases are said in both languages, and a phase of tomorrow does not throw', () => {
  const at = { phase: 'prefill', done: 12, total: 30, unit: 'layers' } as const
  expect(phaseWords(at, translator('ja'))).toBe('プロンプトを処理中、30 層のうち 12 層')
  expect(phaseWords({ ...at, phase: 'loading', unit: 'bytes', done: 2 ** 30, total: 2 ** 31 }, translator('en'))).toBe('loading, 1.0 GiB of 2.0 GiB')
  expect(phaseWords({ ...at, phase: 'measuring', unit: 'sweeps', done: 3, total: 12 }, translator('ja'))).toBe('計測中、12 回のうち 3 回')
  expect(phaseWords({ ...at, phase: 'dreaming', unit: 'sheep' } as never, translator('ja'))).toBe('dreaming、30 sheepのうち 12 sheep')
  expect(phaseWords({ ...at, phase: 'toString', total: 0 } as never, translator('en'))).toBe('toString')
})

test('figures: tokens, speed, tokens of a sweep, first token, what bounds it', () => {
  show()
  say({ tokens: 1412, generation_tps: 9.83, tokens_per_sweep: 2.4, first_token_s: 1.9 })
  const figures = [...root.querySelectorAll('.figure')].map(figure => figure.textContent)
  expect(figures).toEqual(['1,412 tokens', '9.8 tok/s', '2.4 tokens per sweep', 'first token after 1.9 s', 'bound by bus to cuda:0, 25.0 GB/s'])
  say({ seq: 2, tokens: 1, tokens_per_sweep: 1.04 })
  expect(words('.figures')).not.toContain('sweep')
  expect(words('.figures')).toContain('1 token')
})

test('the bound is said in Japanese, and stays where it is not known', () => {
  const t = translator('ja')
  expect(boundWords(t, 'bus to cuda:0, 25.0 GB/s')).toBe('cuda:0 へのバス、25.0 GB/s')
  expect(boundWords(t, 'disk, 500 MB/s')).toBe('ディスク、500 MB/s')
  expect(boundWords(t, 'the moon')).toBe('the moon')
})

test('the placement has a part for every kind, the fastest first, with words', () => {
  show({ placement: { disk: 11, gpu: 27, 'ram-streamed': 60, 'looked-up': 2, tape: 5 } })
  const parts = [...root.querySelectorAll('.place-part')].map(part => part.className)
  expect(parts).toEqual(['gpu', 'looked-up', 'ram-streamed', 'disk', 'other'].map(kind => `place-part fill-${kind}`))
  expect(words('.place-words')).toBe('27 % GPU2 % looked up60 % RAM streamed11 % disk5 % tape')
  shown.update({ ...STATE, placement: { ram: 100 } })
  expect(words('.place-words')).toBe('100 % RAM')
})

test('seconds go on between events', () => {
  show()
  say({ elapsed_s: 3 })
  vi.advanceTimersByTime(1400)
  expect(words('.answer-time')).toBe('4.4 s')
})

test('Stop is a button only when the kernel hears it, and is sent once', () => {
  show()
  expect(find('button.stop')).toBeNull()
  expect(words('.stop-control')).toBe('use ■ Interrupt to stop')
  shown.event({ type: 'hello', view: 'a' })
  const stop = find('button.stop') as HTMLButtonElement
  stop.click()
  stop.click()
  expect(sent).toEqual([{ type: 'stop', view: 'a' }])
  expect(stop.textContent).toBe('Stopping…')
  expect(stop.disabled).toBe(true)
  shown.event({ type: 'hello', view: 'a' })
  expect(find('button.stop')).toBe(stop)
})

test('Copy copies the text there is, or selects it', async () => {
  show()
  say({ text: 'to copy' })
  const written: string[] = []
  Object.defineProperty(navigator, 'clipboard', { configurable: true, value: { writeText: async (text: string) => void written.push(text) } })
  find('button.copy')?.click()
  await vi.waitFor(() => expect(words('.copy-said')).toBe('Copied'))
  expect(written).toEqual(['to copy'])
  Object.defineProperty(navigator, 'clipboard', { configurable: true, value: undefined })
  find('button.copy')?.click()
  await vi.waitFor(() => expect(words('.copy-said')).toContain('Ctrl-C'))
  expect(getSelection()?.toString()).toBe('to copy')
})

test('the end is followed while the reader is there, and left when the reader goes up', () => {
  show()
  scrolls(1000, 200)
  say({ seq: 1, text: 'a' })
  expect(log().scrollTop).toBe(1000)
  scrollTo(800)
  expect(find('.newest')?.hidden).toBe(true)
  scrollTo(795)
  expect(find('.newest')?.hidden).toBe(false)
  say({ seq: 2, text: 'b' })
  expect(log().scrollTop).toBe(795)
  find('.newest')?.click()
  expect(log().scrollTop).toBe(1000)
  expect(find('.newest')?.hidden).toBe(true)
  expect(log().hasAttribute('data-scrolls')).toBe(true)
})

test('coming back near the end follows it again', () => {
  show()
  scrolls(1000, 200)
  say({ seq: 1, text: 'a' })
  scrollTo(400)
  scrollTo(785)
  say({ seq: 2, text: 'b' })
  expect(log().scrollTop).toBe(1000)
})

test('a screen reader hears whole sentences, every three seconds at most', () => {
  show()
  expect(log().getAttribute('aria-live')).toBe('off')
  const spoken = find('.spoken') as HTMLElement
  expect(spoken.getAttribute('aria-live')).toBe('polite')
  const changes: (string | null)[] = []
  let seq = 0
  for (const text of ['It is 3.', '5 km. Then', ' left.', '\nこれは', '文です。次', ' is', ' open']) {
    say({ seq: ++seq, text })
    if (spoken.textContent !== changes.at(-1)) changes.push(spoken.textContent)
  }
  expect(spoken.textContent).toBe('')
  vi.advanceTimersByTime(2900)
  expect(spoken.textContent).toBe('')
  vi.advanceTimersByTime(200)
  expect(spoken.textContent).toBe('It is 3.5 km. Then left.\nこれは文です。')
  say({ seq: 8, text: ' now. ' })
  expect(spoken.textContent).toContain('3.5 km')
  vi.advanceTimersByTime(3000)
  expect(spoken.textContent).toBe('次 is open now.')
})

test('when the answer ends a screen reader hears its last words, and that it is done', () => {
  show()
  say({ text: 'A sentence. And half of' })
  vi.advanceTimersByTime(3000)
  expect(words('.spoken')).toBe('A sentence.')
  const page = document.querySelector('.llm-magic-spoken')
  expect([page?.textContent, page?.getAttribute('aria-live')]).toEqual(['', 'polite'])
  shown.cleanup()
  root.remove()
  expect(page?.isConnected).toBe(true)
  expect(page?.textContent).toBe('And half of\nThe answer is done.')
})

test('an answer that was lost, or of which nothing is heard, is not called done', () => {
  show()
  say({ text: 'half' })
  shown.lost('The kernel ended.')
  shown.cleanup()
  expect(document.querySelector('.llm-magic-spoken')).toBeNull()
  show()
  say({ text: 'half' })
  vi.advanceTimersByTime(60_000)
  shown.cleanup()
  expect(document.querySelector('.llm-magic-spoken')).toBeNull()
})

test('a page that was loaded again does not hear the answer from its start', () => {
  show()
  const story = 'A long story. '.repeat(50)
  say({ seq: 7, text: story, whole: true })
  vi.advanceTimersByTime(4000)
  expect(words('.spoken')).toBe('')
  say({ seq: 8, text: `${story}It ends. `, whole: true })
  vi.advanceTimersByTime(3000)
  expect(words('.spoken')).toBe('It ends.')
})

test('the first event is whole, and its words are heard', () => {
  show()
  say({ seq: 1, text: 'It', whole: true })
  say({ seq: 2, text: ' begins. ' })
  vi.advanceTimersByTime(3000)
  expect(words('.spoken')).toBe('It begins.')
})

test('a format that needs the whole answer shows no text, but how far it is', () => {
  show({ streams_text: false })
  say({ text: '{"half":', tokens: 52 })
  expect(words('.answer-note')).toBe('The answer is shown when it is done.')
  expect(log().textContent).toBe('')
  expect(find('.answer-frame')?.hidden).toBe(true)
  expect(find('.copy-control')?.hidden).toBe(true)
  expect(words('.figures')).toContain('52 tokens')
  vi.advanceTimersByTime(7000)
  expect(words('.spoken')).toBe('')
})

test('when the kernel is lost the text stays, and nothing can be stopped', () => {
  show()
  shown.event({ type: 'hello', view: 'a' })
  say({ text: 'half an ans', elapsed_s: 2 })
  expect(words('.answer-phase')).toBe('generating')
  shown.lost('The kernel ended.')
  expect(words('.lost')).toBe('The kernel ended.')
  expect(find('.lost')?.getAttribute('role')).toBe('status')
  expect(log().textContent).toBe('half an ans')
  expect(words('.answer-phase')).toBe('interrupted')
  say({ seq: 2, text: 'wer', elapsed_s: 2 })
  shown.update(STATE)
  expect(words('.answer-phase')).toBe('interrupted')
  expect(log().textContent).toBe('half an ans')
  expect(words('.stop-control')).toBe('')
  shown.event({ type: 'hello', view: 'a' })
  expect(find('button.stop')).toBeNull()
  vi.advanceTimersByTime(5000)
  expect(words('.answer-time')).toBe('2.0 s')
})

test('an answer that is not in the page does not count seconds', () => {
  show()
  say({ elapsed_s: 3 })
  root.remove()
  vi.advanceTimersByTime(2000)
  expect(words('.answer-time')).toBe('3.0 s')
  document.body.append(root)
  vi.advanceTimersByTime(400)
  expect(words('.answer-time')).toBe('5.4 s')
})

test('cleanup leaves no timer', () => {
  show()
  expect(vi.getTimerCount()).toBeGreaterThan(0)
  shown.cleanup()
  expect(vi.getTimerCount()).toBe(0)
})
