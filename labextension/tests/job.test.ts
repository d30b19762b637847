import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { type Language, translator } from '../src/i18n'
import type { Shown, StateOf } from '../src/view'
import { jobView } from '../src/views/job/view'
import type { Command, PlanState, ProgressEvent } from '../src/wire'
import states from './states.json'

type State = StateOf<'job'>

const PLAN = states.streamed.plan as unknown as PlanState
const LABELS = PLAN.blocks.map(block => block.label)
const EVENT: ProgressEvent = {
  type: 'progress', view: 'b', phase: 'loading', done: 0, total: 0, unit: '', detail: '', elapsed_s: 0, left_s: 0,
}

let root: HTMLElement
let sent: Command[]
let shown: Shown<State>

function show(plan: PlanState | null = PLAN, language: Language = 'en'): void {
  root = document.createElement('div')
  document.body.replaceChildren(root)
  sent = []
  shown = jobView({ type: 'job', title: 'Loading qwen', plan }, { root, view: 'b', language, t: translator(language), send: command => sent.push(command) })
}
const say = (event: Partial<ProgressEvent>) => shown.event({ ...EVENT, ...event })
const find = (selector: string) => root.querySelector<HTMLElement>(selector)
const words = (selector: string) => find(selector)?.textContent ?? ''
const done = () => [...root.querySelectorAll('.job-cell.done')].map(cell => cell.getAttribute('data-label')).sort()
const now = () => [...root.querySelectorAll('.job-cell.now')].map(cell => cell.getAttribute('data-label'))

// jsdom has timers of its own: only what the views use is faked.
beforeEach(() => vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval', 'performance'] }))
afterEach(() => {
  shown.cleanup()
  vi.useRealTimers()
})

test('title, phase, bar and bytes', () => {
  show(null)
  expect(words('.head')).toContain('Loading qwen')
  expect(words('.job-phase')).toBe('starting')
  expect(find('[role=progressbar]')?.hasAttribute('aria-valuenow')).toBe(false)
  say({ phase: 'downloading', done: 2 ** 30, total: 4 * 2 ** 30, unit: 'bytes', detail: 'Qwen/Qwen3' })
  expect(words('.job-phase')).toBe('downloading, 1.0 GiB of 4.0 GiB')
  expect(find('[role=progressbar]')?.getAttribute('aria-valuenow')).toBe('25')
  expect(find('[role=progressbar]')?.getAttribute('aria-valuetext')).toBe('downloading, 1.0 GiB of 4.0 GiB')
  expect(words('.job-now')).toBe('now: Qwen/Qwen3')
  expect(find('.job-tiers')?.hidden).toBe(true)
})

test('in Japanese too', () => {
  show(PLAN, 'ja')
  say({ done: 3, total: 67, unit: 'blocks', detail: 'layers.1', left_s: 12.3 })
  expect(words('.job-phase')).toBe('読み込み中、67 ブロックのうち 3 ブロック')
  expect(words('.job-left')).toBe('残り約 12 s')
  expect(words('.job-now')).toBe('処理中: layers.1')
})

test('time goes on, and the time left goes down, between events', () => {
  show()
  say({ elapsed_s: 10, left_s: 12.4 })
  expect(words('.job-left')).toBe('about 12 s left')
  vi.advanceTimersByTime(3000)
  expect(words('.job-time')).toBe('13.0 s')
  expect(words('.job-left')).toBe('about 9 s left')
  vi.advanceTimersByTime(60_000)
  expect(words('.job-left')).toBe('about 1 s left')
  say({ elapsed_s: 11, left_s: 75 })
  expect(words('.job-left')).toBe('about 1 min 15 s left')
  say({ elapsed_s: 12, left_s: 0 })
  expect(words('.job-left')).toBe('')
})

test('the tiers are bars at one scale, a cell for each block, in the colour of what happens to it', () => {
  show()
  const bars = [...root.querySelectorAll<HTMLElement>('.job-bar')]
  expect(bars).toHaveLength(3)
  // 40,958,400,000 B in RAM are the most; 18,134,234,880 B on the GPU are 44.27 % of them
  expect(bars.map(bar => bar.style.getPropertyValue('--width'))).toEqual(['44.27%', '100.00%', '15.70%'])
  expect(root.querySelectorAll('.job-cell')).toHaveLength(67)
  expect(find('[data-label="layers.0"] > span')?.className).toBe('fill-ram-streamed')
  expect(find('[data-label="embed"] > span')?.className).toBe('fill-looked-up')
  expect(words('.job-count')).toBe('0 of 19 blocks · 16.9 GiB')
})

test('a block is done when the next one begins', () => {
  show()
  say({ done: 0, total: 67, unit: 'blocks', detail: 'layers.7' })
  expect([done(), now()]).toEqual([[], ['layers.7']])
  say({ done: 1, total: 67, unit: 'blocks', detail: 'layers.3' })
  expect([done(), now()]).toEqual([['layers.7'], ['layers.3']])
  say({ done: 2, total: 67, unit: 'blocks', detail: 'layers.30' })
  expect([done(), now()]).toEqual([['layers.3', 'layers.7'], ['layers.30']])
})

test('names of tensors mean their blocks', () => {
  show()
  say({ detail: 'model.embed_tokens.weight' })
  expect(now()).toEqual(['embed'])
  say({ detail: 'model.layers.1.mlp.down_proj.weight' })
  say({ detail: 'model.layers.11.self_attn.q_norm.weight' })
  expect([done(), now()]).toEqual([['embed', 'layers.1'], ['layers.11']])
  say({ detail: 'lm_head.weight' })
  expect(now()).toEqual(['head'])
})

test('where no block is named the share that is done fills them', () => {
  show()
  say({ done: 10, total: 100, unit: 'tensors', detail: 'some.file' })
  // 10 % of 67 blocks
  expect(done()).toEqual(LABELS.slice(0, 6).sort())
  say({ done: 100, total: 100, unit: 'tensors' })
  expect(done()).toHaveLength(67)
  expect(now()).toEqual([])
})

test('blocks that no event named are counted by the share as well', () => {
  show()
  say({ done: 33, total: 67, unit: 'blocks', detail: 'layers.32' })
  expect(done()).toEqual(LABELS.slice(0, 32).sort())
  expect(now()).toEqual(['layers.32'])
})

test('nothing fills while nothing is put in its place', () => {
  show()
  say({ phase: 'converting', done: 50, total: 100, unit: 'tensors', detail: 'layers.3' })
  say({ phase: 'planning' })
  expect([done(), now()]).toEqual([[], []])
})

test('a move leaves the other blocks where they are', () => {
  show()
  say({ phase: 'moving', done: 0, total: 2, unit: 'blocks', detail: 'layers.5' })
  expect(done()).toHaveLength(67)
  expect(now()).toEqual(['layers.5'])
})

test('a plan may come later, and a new one keeps what is done', () => {
  show(null)
  say({ done: 1, total: 67, unit: 'blocks', detail: 'layers.0' })
  shown.update({ type: 'job', title: 'Loading qwen', plan: PLAN })
  say({ done: 2, total: 67, unit: 'blocks', detail: 'layers.1' })
  expect(done()).toEqual(['embed'])
  shown.update({ type: 'job', title: 'Loading qwen again', plan: PLAN })
  expect(done()).toEqual(['embed'])
  expect(words('.head-title')).toBe('Loading qwen again')
})

test('unknown phases and ways do not throw', () => {
  const odd = { ...PLAN, blocks: PLAN.blocks.map(block => ({ ...block, way: 'teleported' as never })) }
  show(odd)
  say({ phase: 'dreaming' as never, done: 1, total: 2, unit: 'sheep' })
  expect(words('.job-phase')).toBe('dreaming, 1 of 2 sheep')
  expect(find('.job-cell > span')?.className).toBe('fill-other')
})

test('Cancel is a button only when the kernel hears it, and is sent once', () => {
  show()
  expect(words('.stop-control')).toBe('use ■ Interrupt to stop')
  shown.event({ type: 'hello', view: 'b' })
  const cancel = find('button.stop') as HTMLButtonElement
  expect(cancel.textContent).toBe('Cancel')
  cancel.click()
  cancel.click()
  expect(sent).toEqual([{ type: 'stop', view: 'b' }])
  expect(cancel.textContent).toBe('Cancelling…')
})

test('titles and details are text', () => {
  const payload = '<img src=x onerror=alert(1)>'
  show({ ...PLAN, blocks: PLAN.blocks.map(block => ({ ...block, label: `${payload}${block.label}` })) })
  shown.update({ type: 'job', title: payload, plan: null })
  say({ detail: payload })
  expect(root.querySelector('img')).toBeNull()
  expect(words('.head-title')).toBe(payload)
})

test('lost: a message, no Cancel, no timer', () => {
  show()
  shown.event({ type: 'hello', view: 'b' })
  say({ done: 1, total: 67, unit: 'blocks', detail: 'layers.3', left_s: 12 })
  expect(now()).toEqual(['layers.3'])
  shown.lost('The kernel ended.')
  expect(find('.lost')?.getAttribute('role')).toBe('status')
  expect(now()).toEqual([])
  expect(words('.job-now')).toBe('')
  expect(words('.job-phase')).toBe('interrupted')
  say({ done: 2, total: 67, unit: 'blocks', detail: 'layers.4', left_s: 12 })
  expect([now(), words('.job-now'), words('.job-left')]).toEqual([[], '', ''])
  expect(words('.lost')).toBe('The kernel ended.')
  expect(find('button.stop')).toBeNull()
  expect(words('.job-left')).toBe('')
  expect(vi.getTimerCount()).toBe(0)
})

test('a screen reader hears each phase once, and not how far it is', () => {
  show()
  const spoken = find('.job-spoken') as HTMLElement
  const observer = new MutationObserver(() => undefined)
  observer.observe(spoken, { childList: true })
  expect(spoken.getAttribute('role')).toBe('status')
  say({ phase: 'loading', done: 1, total: 67, unit: 'blocks' })
  say({ phase: 'loading', done: 2, total: 67, unit: 'blocks' })
  expect(observer.takeRecords()).toHaveLength(1)
  expect(spoken.textContent).toBe('loading')
  say({ phase: 'measuring' })
  expect(spoken.textContent).toBe('measuring')
})

test('cleanup leaves no timer', () => {
  show()
  shown.cleanup()
  expect(vi.getTimerCount()).toBe(0)
})
