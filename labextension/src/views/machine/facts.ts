/** The machine in words: what a device and a link are, and what of it is assumed (`≈`). */

import type { Translate, Word } from '../../i18n'
import { formatBandwidth, formatBytes, formatFlops } from '../../units'
import type { DeviceState, LinkState, MachineState } from '../../wire'

// Less than this is noise of the driver, and not worth a sentence.
export const WORTH_SAYING_BYTES = 64 * 2 ** 20

const PARTS = new Map<string, Word>([
  ['total', 'machinePartTotal'],
  ['free', 'machinePartFree'],
  ['read', 'machinePartRead'],
  ['flops', 'machinePartFlops'],
])

export function approximate(text: string, isAssumed: boolean): string {
  return isAssumed ? `≈ ${text}` : text
}

export const totalWords = (device: DeviceState) =>
  device.total ? approximate(formatBytes(device.total), device.assumed.includes('total')) : ''
export const freeWords = (device: DeviceState) =>
  device.total ? approximate(formatBytes(device.free), device.assumed.includes('free')) : ''
export const readWords = (device: DeviceState) =>
  device.read_bytes_per_s ? approximate(formatBandwidth(device.read_bytes_per_s), device.assumed.includes('read')) : ''
export const flopsWords = (device: DeviceState) =>
  device.flops ? approximate(formatFlops(device.flops), device.assumed.includes('flops')) : ''

/** `22.9 GiB free of 24.0 GiB`. */
export function roomWords(device: DeviceState, t: Translate): string {
  return device.total ? t('machineFree', { free: freeWords(device), total: totalWords(device) }) : ''
}

/** What it is: `GPU`, `CPU`, `Disk`, `NPU`; a kind that we do not know by its own name. */
export function kindWords(device: DeviceState, t: Translate): string {
  const kinds: Record<DeviceState['kind'], Word> = { gpu: 'gpu', cpu: 'machineCpu', disk: 'disk', npu: 'npu' }
  return Object.hasOwn(kinds, device.kind) ? t(kinds[device.kind]) : String(device.kind)
}

/** The name of a device's memory: `VRAM`, `RAM`, `Unified memory`, `Disk`. */
export function memoryWords(device: DeviceState, state: MachineState, t: Translate): string {
  if (device.kind === 'disk') return t('disk')
  if (isShared(device, state)) return t('machineUnified')
  return device.kind === 'cpu' ? t('ram') : t('machineVram')
}

/** Where bytes are, in a few letters: `RAM`, `disk`, `cuda:0`. */
export function placeWords(id: string, state: MachineState, t: Translate): string {
  if (id === 'disk') return t('machineDisk')
  if (id !== 'cpu') return id
  return unifiedGpus(state).length ? t('machineUnifiedPlace') : t('ram')
}

export function unifiedGpus(state: MachineState): DeviceState[] {
  const hasCpu = state.devices.some(device => device.kind === 'cpu')
  return hasCpu ? state.devices.filter(device => device.kind === 'gpu' && device.unified) : []
}

function isShared(device: DeviceState, state: MachineState): boolean {
  return (device.kind === 'gpu' && device.unified) || (device.kind === 'cpu' && unifiedGpus(state).length > 0)
}

/** `25.0 GB/s`, `≈ 25.0 GB/s`, or that nobody knows. */
export function speedWords(link: LinkState, t: Translate): string {
  return link.bytes_per_s ? approximate(formatBandwidth(link.bytes_per_s), link.assumed) : t('machineUnknownSpeed')
}

/** One speed for several links, or from the slowest to the fastest. */
export function rangeWords(links: LinkState[], t: Translate): string {
  const speeds = [Math.min, Math.max].map(pick => pick(...links.map(link => link.bytes_per_s)))
  const words = [...new Set(speeds.map(speed => (speed ? formatBandwidth(speed) : t('machineUnknownSpeed'))))]
  return approximate(words.join(' – '), links.some(link => link.assumed))
}

/** `measured 2026-11-22`, `described in a file` or `assumed`. */
export function provenance(state: MachineState, t: Translate): string {
  const dates = [...state.devices, ...state.links].map(one => one.measured_on).filter(Boolean).sort()
  const [first, last] = [dates[0], dates.at(-1)]
  const measured = !first || !last ? ''
    : first === last ? t('machineMeasured', { date: first }) : t('machineMeasuredSpan', { first, last })
  if (state.described) return measured ? t('machineDescribedAnd', { measured }) : t('machineDescribed')
  return measured || t('machineAssumedAll')
}

/** All that is known of a device, a line each. */
export function deviceLines(device: DeviceState, t: Translate): string[] {
  const reads = readWords(device)
  const computes = flopsWords(device)
  return [
    `${device.id} · ${kindWords(device, t)} · ${device.name}`,
    device.kind === 'npu' ? t('machineNamedOnly') : '',
    roomWords(device, t),
    device.other >= WORTH_SAYING_BYTES ? t('machineOtherBytes', { size: formatBytes(device.other) }) : '',
    [reads && t('machineReads', { speed: reads }), computes && t('machineComputes', { speed: computes })].filter(Boolean).join(' · '),
    sourceWords(device, t),
  ].filter(Boolean)
}

/** How and when it was measured, and what of it is assumed. */
export function sourceWords(device: DeviceState, t: Translate): string {
  const parts = device.assumed.map(part => partWords(part, t))
  return [
    device.method && t('machineMethod', { method: device.method }),
    device.measured_on && t('machineMeasured', { date: device.measured_on }),
    parts.length ? t('machineAssumed', { what: parts.join(', ') }) : t('machineNothingAssumed'),
  ].filter(Boolean).join(' · ')
}

/** All that is known of a link. */
export function linkLine(link: LinkState, state: MachineState, t: Translate): string {
  const way = t('machineHop', { source: placeWords(link.source, state, t), target: placeWords(link.target, state, t) })
  return [way, speedWords(link, t), link.name, linkSourceWords(link, t)].filter(Boolean).join(' · ')
}

export function linkSourceWords(link: LinkState, t: Translate): string {
  if (link.assumed) return t('machineAssumed', { what: t('machinePartSpeed') })
  return link.measured_on ? t('machineMeasured', { date: link.measured_on }) : t('machineNothingAssumed')
}

function partWords(part: string, t: Translate): string {
  const word = PARTS.get(part)
  return word ? t(word) : part
}
