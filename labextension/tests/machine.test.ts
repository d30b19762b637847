import { afterEach, expect, test, vi } from 'vitest'
import { type Language, translator } from '../src/i18n'
import type { Shown, StateOf } from '../src/view'
import { machineView } from '../src/views/machine/view'
import { MACHINE_CSS } from '../src/views/machine/css'
import { strokeWidth } from '../src/views/machine/draw'
import { layout } from '../src/views/machine/layout'
import { pathOf } from '../src/views/machine/path'
import states from './states.json'

type State = StateOf<'machine'>

const NAMES = ['machine', 'laptop', 'mac', 'cluster', 'two'] as const
const state = (name: (typeof NAMES)[number]) => structuredClone(states[name]) as unknown as State
const MOVE = { source: 'disk', target: 'mps', bytes: 2e9, bytes_per_s: 5e9 }

let root: HTMLElement
let shown: Shown<State>

function show(machine: State, language: Language = 'en'): void {
  root = document.createElement('div')
  document.body.replaceChildren(root)
  shown = machineView(machine, { root, view: 'c', language, t: translator(language), send: () => undefined })
}
const find = (selector: string) => root.querySelector<HTMLElement>(selector)
const texts = (selector: string) => [...root.querySelectorAll(selector)].map(found => found.textContent ?? '')
const picture = () => texts('svg text').join(' | ')
const keys = () => [...root.querySelectorAll('.mv-thing')].map(thing => thing.getAttribute('data-key'))

afterEach(() => shown?.cleanup())

test.each(NAMES)('%s: each device and each link is there, in the picture and in the table', name => {
  const machine = state(name)
  show(machine)
  for (const device of machine.devices) {
    expect(picture()).toContain(device.id === 'mps' ? 'mps' : device.id)
    expect(texts('tbody th')).toContain(device.id)
  }
  expect(texts('table caption').slice(0, 2)).toEqual(['Devices', 'Links'])
  expect(root.querySelectorAll('table')[1]?.querySelectorAll('tbody tr')).toHaveLength(machine.links.length)
  const drawn = layout(machine, pathOf(machine), 640, translator('en')).ways.flatMap(way => way.links)
  expect(new Set(drawn).size).toBe(machine.links.length)
})

test('a desktop: free of total, bandwidths, compute, buses, what is assumed', () => {
  show(state('machine'))
  expect(texts('svg text')).toEqual(expect.arrayContaining([
    'cuda:0', 'RTX 4090', '165 TFLOPS', '1008 GB/s', 'VRAM', '22.9 GiB free of 24.0 GiB',
    'PCIe 4 x16 · ↕ 25.0 GB/s', 'RAM', '≈ 57.6 GiB free of 64.0 GiB', '60.0 GB/s', '1.5 TFLOPS',
    'NVMe SSD · ↑ 6.0 GB/s', 'Disk', '1.1 TiB free of 1.8 TiB',
  ]))
  expect(texts('.note')).toEqual(['≈ is assumed, not measured.'])
})

test('a laptop: no GPU, and what is assumed of its disk', () => {
  show(state('laptop'))
  expect(picture()).toContain('SSD · ↑ ≈ 500 MB/s')
  expect(texts('.note')).toEqual(['No GPU: models compute on the CPU, from RAM and disk.', '≈ is assumed, not measured (typical SSD speed).'])
})

test('a Mac: one memory, two processors, and an NPU that is named only', () => {
  show(state('mac'))
  expect(texts('.mv-memory .mv-strong')).toEqual(['Unified memory', 'Disk'])
  expect(picture()).toContain('mps may use 48.0 GiB')
  expect(picture()).toContain('named only')
  expect(texts('.note')[0]).toContain('share one memory: moving weights from one to the other frees nothing')
  expect(texts('.note')[1]).toContain('npu:0 (Apple Neural Engine) is named only')
  expect(keys()).not.toContain('cpu-mps')
})

test('eight GPUs: a grid, one label for their buses, one for their links', () => {
  show(state('cluster'))
  expect(picture()).toContain('8 × PCIe 5 x16 · ↕ 50.0 GB/s each')
  expect(picture()).toContain('NVLink 4 · every GPU ↔ every GPU · ↔ 400 GB/s')
  expect(texts('svg text').filter(text => /^cuda:\d$/.test(text))).toHaveLength(8)
  // The links of eight GPUs are two things to point at, not 72.
  expect(keys()).toHaveLength(8 + 1 + 1 + 2 + 1)
})

test.each([300, 452, 700, 972])('nothing lies over another card or outside at %d px', width => {
  for (const name of NAMES) {
    const machine = state(name)
    const { cards, lane, height } = layout(machine, pathOf(machine), width, translator('ja'))
    for (const [i, one] of cards.entries()) {
      expect(one.x).toBeGreaterThanOrEqual(0)
      expect(one.x + one.width).toBeLessThanOrEqual(width - lane + 0.01)
      expect(one.y + one.height).toBeLessThanOrEqual(height)
      for (const other of cards.slice(i + 1)) {
        const isApart = one.x + one.width <= other.x || other.x + other.width <= one.x || one.y + one.height <= other.y || other.y + other.height <= one.y
        expect(isApart, `${name}: ${one.devices[0]?.id} and ${other.devices[0]?.id}`).toBe(true)
      }
    }
  }
})

test('two GPUs: own words at each bus, the bridge between them, other programs hatched', () => {
  show(state('two'))
  expect(picture()).toContain('NVLink bridge · ↔ 45.0 GB/s')
  expect(texts('.way text').filter(text => text.startsWith('PCIe 4 x16'))).toHaveLength(2)
  expect(root.querySelectorAll('.mv-other')).toHaveLength(1)
  expect(find('.mv-other')?.getAttribute('fill')).toMatch(/^url\(#/)
  expect(texts('.note')[0]).toBe('Other programs hold 4.0 GiB of cuda:1.')
})

test('the path: from the disk over the RAM to the GPU, and its reads; the bus that carries both is the slowest', () => {
  const path = pathOf(state('machine'))
  // disk: 4.876e9 B / 6e9; bus: (40.9584e9 + 4.876e9) B / 25e9; reads: 64.1e9 B / 1008e9
  expect(path.steps.map(step => [step.number, step.source, step.target, step.bytes, Number(step.seconds.toFixed(3))])).toEqual([
    [1, 'disk', 'cpu', 4876000000, 0.813],
    [2, 'cpu', 'cuda:0', 45834400000, 1.833],
    [3, 'cuda:0', 'cuda:0', 64102852608, 0.064],
  ])
  expect(path.limiting).toEqual([path.steps[1]])
  show(state('machine'))
  expect(texts('.mv-steps .mv-words')).toEqual([
    'disk → RAM 4.5 GiB per token, 813 ms',
    'RAM → cuda:0 42.7 GiB per token, 1.8 s (sets the pace)',
    'cuda:0 reads its VRAM 59.7 GiB per token, 64 ms',
  ])
  expect(texts('.mv-sums dd')).toEqual([
    '47.2 GiB moved, 59.7 GiB read in place', 'RAM → cuda:0, 1.8 s',
    '0.55 tok/s: copies go on while layers compute, and the slowest sets the pace',
  ])
  expect(texts('.mv-step').sort()).toEqual(['14.5 GiB · 813 ms', '242.7 GiB · 1.8 s', '359.7 GiB · 64 ms'])
  expect(root.querySelectorAll('.mv-flow.limiting')).toHaveLength(1)
})

test('reads of memory come one after the other, and may set the pace together', () => {
  const machine = state('cluster')
  machine.moves = machine.devices.filter(device => device.kind === 'gpu').flatMap(({ id }) => [
    { source: 'cpu', target: id, bytes: 1e9, bytes_per_s: 5e10 }, { source: id, target: id, bytes: 6.7e10, bytes_per_s: 3.35e12 },
  ])
  const path = pathOf(machine)
  expect(path.seconds).toBeCloseTo(8 * 0.02)
  expect(path.limiting).toHaveLength(8)
  show(machine)
  expect(texts('.mv-sums dd')[1]).toBe('memory, read by one device after the other, 160 ms')
  // All buses as one label: 8 × 1e9 B.
  expect(texts('.way .mv-step')).toContain('1–87.5 GiB · 20 ms')
})

test('in unified memory bytes of the disk are where the GPU reads them', () => {
  const machine = { ...state('mac'), model: 'gemma', moves: [MOVE, { source: 'mps', target: 'mps', bytes: 1.6e10, bytes_per_s: 4e11 }] }
  expect(pathOf(machine).steps.map(step => [step.source, step.target])).toEqual([['disk', 'cpu'], ['mps', 'mps']])
  show(machine)
  expect(texts('.mv-words')).toEqual([
    'disk → unified memory 1.9 GiB per token, 400 ms (sets the pace)', 'mps reads the unified memory 14.9 GiB per token, 40 ms',
  ])
})

test('a direct way from the disk to a GPU is drawn and used', () => {
  const machine = state('two')
  machine.links.push({ source: 'disk', target: 'cuda:1', bytes_per_s: 6e9, name: 'GPUDirect', measured_on: '', assumed: false })
  machine.moves = [{ ...MOVE, target: 'cuda:1' }]
  show(machine)
  expect(texts('.mv-words')[0]).toBe('disk → cuda:1 1.9 GiB per token, 333 ms (sets the pace)')
  expect(picture()).toContain('GPUDirect · ↑ 6.0 GB/s')
  expect(root.querySelectorAll('[data-key="disk-gpus"] .mv-flow')).toHaveLength(1)
})

test('a way of unknown speed has no time, and no pace is told', () => {
  const machine = state('machine')
  for (const one of [...machine.links, ...machine.moves]) one.bytes_per_s = 0
  show(machine)
  expect(texts('.mv-words')[1]).toBe('RAM → cuda:0 42.7 GiB per token, time unknown')
  expect(texts('.mv-sums dt')).toEqual(['Per token'])
})

test('the button shows and hides the path; without moves there is none', () => {
  show(state('machine'))
  const button = find('.mv-toggle') as HTMLElement
  expect([button.textContent, button.getAttribute('aria-pressed')]).toEqual(['Path of one token', 'true'])
  button.click()
  expect(button.getAttribute('aria-pressed')).toBe('false')
  expect(find('.mv')?.classList.contains('lit')).toBe(false)
  expect(find('.mv-steps')?.hidden).toBe(true)
  shown.update(state('two'))
  expect(button.getAttribute('aria-pressed')).toBe('false')
  button.click()
  expect(find('.mv')?.classList.contains('lit')).toBe(true)
  shown.update(state('mac'))
  expect(button.hidden).toBe(true)
  expect(find('.mv-no-path')?.hidden).toBe(false)
  expect(root.querySelectorAll('.mv-flow')).toHaveLength(0)
})

test('pointing at a thing, or the focus, says how it was measured; Escape hides it', () => {
  const machine = state('two')
  Object.assign(machine.links[0] ?? {}, { measured_on: '2026-11-22' })
  show(machine)
  const tip = find('.mv-tip') as HTMLElement
  const thing = (key: string) => root.querySelector<SVGElement>(`[data-key="${key}"]`)
  thing('cuda:1')?.dispatchEvent(new FocusEvent('focusin', { bubbles: true }))
  expect(tip.hidden).toBe(false)
  expect(tip.textContent).toContain('4.0 GiB used by other programs')
  expect(tip.textContent).toContain('how: data sheet · assumed: size, reading speed, computing speed')
  thing('cuda:1')?.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape', bubbles: true }))
  expect(tip.hidden).toBe(true)
  thing('fabric')?.dispatchEvent(new MouseEvent('mouseover', { bubbles: true }))
  expect(tip.textContent).toContain('cuda:0 → cuda:1 · 45.0 GB/s · NVLink bridge · measured 2026-11-22')
  expect(thing('fabric')?.getAttribute('aria-label')).toContain('measured 2026-11-22')
  root.querySelector('.mv-head')?.dispatchEvent(new MouseEvent('mouseover', { bubbles: true }))
  expect(tip.hidden).toBe(true)
})

test('where the numbers come from', () => {
  show(state('machine'))
  expect(find('.mv-title')?.textContent).toBe('Desktop with one RTX 4090described in a file')
  const machine = { ...state('machine'), described: false }
  for (const [i, device] of machine.devices.entries()) device.measured_on = `2026-11-2${i}`
  shown.update(machine)
  expect(find('.mv-title')?.textContent).toContain('measured 2026-11-20 to 2026-11-22')
  expect(texts('.note')[0]).toContain('%llm machine --measure measures.')
})

test('in Japanese', () => {
  show(state('machine'), 'ja')
  expect(picture()).toContain('空き 22.9 GiB / 24.0 GiB')
  expect(texts('.mv-words')[0]).toBe('ディスク → RAM: 1 トークンあたり 4.5 GiB、813 ms')
  expect(find('.mv')?.textContent).not.toMatch(/per token|free of|assumed|reads/)
})

test('a new state keeps the focus, the table open, and the shadow of nothing old', () => {
  show(state('machine'))
  const details = find('details') as HTMLDetailsElement
  details.open = true
  root.querySelector<SVGElement>('[data-key="cpu"]')?.focus()
  shown.update(state('two'))
  expect(document.activeElement?.getAttribute('data-key')).toBe('cpu')
  expect(find('details')).toBe(details)
  expect(details.open).toBe(true)
  expect(root.querySelectorAll('svg')).toHaveLength(1)
  expect(picture()).not.toContain('RTX 4090')
})

test('names are text', () => {
  const payload = '<img src=x onerror=alert(1)>'
  const machine = { ...state('machine'), name: payload, model: payload }
  for (const device of machine.devices) Object.assign(device, { name: payload, method: payload, assumed: [payload] })
  for (const link of machine.links) link.name = payload
  show(machine)
  shown.lost(payload)
  root.querySelector('.mv-thing')?.dispatchEvent(new FocusEvent('focusin', { bubbles: true }))
  expect(root.querySelector('img')).toBeNull()
})

test('odd machines do not throw', () => {
  show({ ...state('machine'), devices: [], links: [], moves: [MOVE] })
  const machine = state('machine')
  shown.update({ ...machine, devices: machine.devices.map(device => ({ ...device, kind: 'tpu' as never })) })
  expect(texts('tbody th')).toContain('cuda:0')
  shown.update({ ...machine, devices: machine.devices.filter(device => device.kind !== 'cpu') })
  shown.update({ ...machine, devices: machine.devices.map(device => ({ ...device, total: 0, free: 0, read_bytes_per_s: 0, flops: 0 })) })
  expect(keys()).toContain('cuda:0')
})

test('a wider line is a faster way', () => {
  const widths = [5e8, 6e9, 25e9, 4e11, 3.35e12].map(strokeWidth)
  expect(widths).toEqual([...widths].sort((one, other) => one - other))
  expect(strokeWidth(0)).toBeGreaterThan(1)
  expect(strokeWidth(1e15)).toBeLessThanOrEqual(11)
})

test('lost says so and leaves the picture; cleanup stops watching the width', () => {
  const disconnect = vi.fn()
  let resized: () => void = () => undefined
  vi.stubGlobal('ResizeObserver', class {
    constructor(callback: () => void) { resized = callback }
    observe(): void { /* nothing to watch here */ }
    disconnect = disconnect
  })
  show(state('machine'))
  Object.defineProperty(find('.mv-picture'), 'clientWidth', { value: 452 })
  resized()
  expect(find('svg')?.getAttribute('width')).toBe('452')
  shown.lost('The kernel ended.')
  expect(find('.lost')?.textContent).toBe('The kernel ended.')
  expect(find('.lost')?.getAttribute('role')).toBe('status')
  // Dots that run would look like a model at work.
  expect(find('.mv')?.classList.contains('still')).toBe(true)
  expect(MACHINE_CSS).toContain('.mv.still .mv-dots { display: none; }')
  expect(find('svg')).not.toBeNull()
  shown.cleanup()
  expect(disconnect).toHaveBeenCalled()
  vi.unstubAllGlobals()
})
